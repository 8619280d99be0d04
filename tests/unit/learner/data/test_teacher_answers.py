"""Answers of the teacher: stored once, collection resumed after a crash, each answer trained exactly once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from common.config.loader import validate
from common.config.model import Config, ConfigError
from common.protocol.schema import Sample, Trajectory
from learner.cluster.services import Services
from learner.data.samples import SampleSource
from learner.data.teacher_answers import AnswerFile, Replayed, TeacherAnswers, answers_origin
from learner.errors import RunError
from learner.loop.training_loop import RolloutPipeline, ScoredRollout
from tests.support.stub_loop import ROWS, StubServices

STEPS = 3


def config_of(**sections: dict[str, Any]) -> Config:
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "r"},
        "student": {"model": "m"},
        "context": {"text": "c"},
        "data": {"train": "t"},
        "rollout": {"source": "teacher", "batch_size": 4, "samples_per_prompt": 2, "max_tokens": 8},
        "loss": {"top_k": 4, "support": "teacher", "direction": "forward"},
        "learner": {"steps": STEPS},
    }
    for name, keys in sections.items():
        settings.setdefault(name, {}).update(keys)
    return validate(Config, settings)


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    finish_reason: Any = "stop"


def answer_to(sample: Sample) -> Answer:
    """An answer that no other sample has."""
    return Answer([sample.number + 1, *range(sample.number % 5)])


def opened(path: Path, config: Config, **origin: Any) -> AnswerFile:
    return AnswerFile(path, {**answers_origin(config, contexts=("a", "b"), data="d"), **origin})


def answers_of(path: Path, config: Config) -> TeacherAnswers:
    return TeacherAnswers(config, SampleSource(config, ROWS), opened(path, config))


async def collected(answers: TeacherAnswers, asked: list[Sample] | None = None) -> None:
    async def generate(sample: Sample, prompt: Sequence[int]) -> Answer:
        if asked is not None:
            asked.append(sample)
        assert list(prompt) == [9, *sample.prompt.student_ids]
        await asyncio.sleep(0)
        return answer_to(sample)

    await answers.collect(lambda sample: [9, *sample.prompt.student_ids.tolist()], generate, lambda text: None)


def stored(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


# --- the file -------------------------------------------------------------------------------------------------------


async def test_every_sample_of_the_run_is_answered_once_with_the_context(tmp_path: Path) -> None:
    config, asked = config_of(), list[Sample]()
    answers = answers_of(tmp_path / "x/offpolicy.jsonl", config)
    await collected(answers, asked)
    assert sorted(sample.number for sample in asked) == list(range(STEPS * 8))
    assert len({sample.sampling.seed for sample in asked}) == STEPS * 8
    assert {sample.sampling.top_logprobs for sample in asked} == {0}  # ids of the teacher's engine are of no use
    assert answers.missing() == []


async def test_answers_from_before_a_crash_are_not_generated_again(tmp_path: Path) -> None:
    path, config, asked = tmp_path / "offpolicy.jsonl", config_of(), list[Sample]()
    await collected(answers_of(path, config_of(learner={"steps": 1})))
    path.write_bytes(path.read_bytes()[:-5])  # the last line was cut short
    cut = json.loads(path.read_text().splitlines()[-2])
    again = answers_of(path, config)
    await collected(again, asked)
    assert len(asked) == STEPS * 8 - 7
    assert cut["number"] not in {sample.number for sample in asked}
    assert sorted(line["number"] for line in stored(path)) == list(range(STEPS * 8))


async def test_a_failure_ends_the_collection_and_keeps_earlier_answers(tmp_path: Path) -> None:
    path = tmp_path / "offpolicy.jsonl"
    answers = answers_of(path, config_of())

    async def generate(sample: Sample, prompt: Sequence[int]) -> Answer:
        if sample.number == 5:
            await asyncio.sleep(0.01)
            raise RunError("no worker is left")
        if sample.number > 5:
            await asyncio.Event().wait()
        return answer_to(sample)

    with pytest.raises(RunError, match="no worker is left"):
        await answers.collect(lambda sample: [1], generate, lambda text: None)
    assert [line["number"] for line in stored(path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sections", "origin", "named"),
    [
        ({"rollout": {"temperature": 0.5}}, {}, "temperature is 1.0, here 0.5"),
        ({"rollout": {"stop": ["x"]}}, {}, "stop is"),
        ({"run": {"seed": 3}}, {}, "seed is 0, here 3"),
        ({"teacher": {"model": "other"}}, {}, "model is m, here other"),
        ({}, {"contexts": "others"}, "contexts is"),
        ({}, {"data": "others"}, "data is d, here others"),
        ({}, {"files": {"model.safetensors": [1, 2]}}, "files is"),
    ],
)
def test_answers_of_another_origin_are_refused(
    tmp_path: Path, sections: dict[str, Any], origin: dict[str, Any], named: str
) -> None:
    path = tmp_path / "offpolicy.jsonl"
    opened(path, config_of()).close()
    with pytest.raises(RunError, match=named):
        opened(path, config_of(**sections), **origin)


def test_a_retrained_model_is_another_origin(tmp_path: Path) -> None:
    weights = tmp_path / "model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    config = config_of(student={"model": str(weights.parent)})
    path = tmp_path / "offpolicy.jsonl"
    opened(path, config).close()
    opened(path, config).close()
    weights.write_bytes(b"two.")
    with pytest.raises(RunError, match="files is"):
        opened(path, config)


@pytest.mark.parametrize("content", ['{"a": 1}\n', "[]\n", '{"format": 1'])
def test_a_file_of_another_format_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "offpolicy.jsonl"
    path.write_text(content)
    if content.endswith("\n"):
        with pytest.raises(RunError, match="holds no stored answers"):
            opened(path, config_of())
        assert path.read_text() == content
    else:  # a header that a crash cut short
        opened(path, config_of()).close()
        assert json.loads(path.read_text())["seed"] == 0


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    config, path = config_of(), tmp_path / "offpolicy.jsonl"
    opened(path, config).close()
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(RunError, match=r"offpolicy.jsonl:2 is not a stored answer"):
        opened(path, config)


def test_a_sample_is_stored_once(tmp_path: Path) -> None:
    config = config_of()
    file, sample = opened(tmp_path / "offpolicy.jsonl", config), SampleSource(config, ROWS)[3]
    file.add(sample, Answer([1]))
    with pytest.raises(RunError, match="sample 3 already has an answer"):
        file.add(sample, Answer([2]))


def test_an_answer_to_another_sample_is_not_trained_on(tmp_path: Path) -> None:
    config = config_of()
    source, path = SampleSource(config, ROWS), tmp_path / "offpolicy.jsonl"
    file = opened(path, config)
    file.add(source[3], Answer([1]))
    other = SampleSource(config_of(run={"seed": 1}), ROWS)
    with pytest.raises(RunError, match="answer 3 belongs to"):
        TeacherAnswers(config, other, file).trajectory(other[3], 0)


# --- in the pipeline --------------------------------------------------------------------------------------------------


class Scores(StubServices):
    """Records the answers that are sent to scoring; generates none."""

    scored: list[Trajectory]

    async def rollout(self, sample: Sample) -> tuple[Any, Any]:
        raise AssertionError("the student was asked")

    async def score(self, sample: Sample, item: Any) -> tuple[Any, Any]:
        self.scored = [*getattr(self, "scored", []), item]
        return await super().score(sample, item)


async def trained_on(config: Config, services: StubServices, answers: TeacherAnswers) -> list[ScoredRollout]:
    pipeline = RolloutPipeline(config, cast(Services, services), SampleSource(config, ROWS), 0, 0, [], answers)
    trained: list[ScoredRollout] = []
    for _ in range(config.learner.steps):
        step = [answered async for answered in pipeline.step(lambda failed: None)]
        assert len(step) == 8
        trained += step
        if len(trained) < config.learner.steps * 8:
            pipeline.advance()
            services.version += 1
    await pipeline.close()
    return trained


async def test_a_replayed_run_trains_exactly_the_stored_answers_once_each(tmp_path: Path) -> None:
    config, services = config_of(), Scores()
    answers = answers_of(tmp_path / "offpolicy.jsonl", config)
    await collected(answers)
    trained = await trained_on(config, services, answers)
    lines = {line["sample_id"]: line for line in stored(tmp_path / "offpolicy.jsonl")}
    assert Counter(one.sample.sample_id for one in trained) == Counter(dict.fromkeys(lines, 1))
    assert [one.sample.step for one in trained] == sorted(one.sample.step for one in trained)
    assert {id(one.item) for one in trained} == {id(item) for item in services.scored}
    for one in trained:
        trajectory, sample = cast(Trajectory, one.item), one.sample
        assert trajectory.response_ids.tolist() == lines[sample.sample_id]["response_ids"] == answer_to(sample).ids
        assert trajectory.prompt == sample.prompt  # the student's tokens: no context
        assert trajectory.topk_ids.shape == (len(trajectory.response_ids), 0)
        assert np.isnan(trajectory.sampled_logprobs).all()
        assert one.tokens == len(sample.prompt.student_ids) + len(trajectory.response_ids)
        assert {span.stage for span in one.spans} == {"score"}


class Both(Scores):
    """Engines that answer the student's samples."""

    async def rollout(self, sample: Sample, output: str) -> tuple[Any, Any]:
        return await StubServices.rollout(self, sample, output)


async def test_a_mix_asks_the_engines_for_the_students_and_replays_the_teachers(tmp_path: Path) -> None:
    mix = {"source": "student", "topk_from": "learner", "mix": {"teacher": 0.5, "teacher_steps": 1}}
    config = config_of(rollout=mix, loss={"support": "student"})
    source = SampleSource(config, ROWS)
    taught = {source[number].sample_id for number in range(STEPS * 8) if source[number].from_teacher}
    answers, asked = answers_of(tmp_path / "offpolicy.jsonl", config), list[Sample]()
    await collected(answers, asked)
    assert {sample.sample_id for sample in asked} == taught
    services = Both()
    trained = await trained_on(config, services, answers)
    assert {one.sample.sample_id for one in trained if isinstance(one.summary, Replayed)} == taught
    assert set(services.asked) == {source[number].sample_id for number in range(STEPS * 8)} - taught
    assert len(taught) == 8 + 2 * 4


async def test_the_learner_can_pick_its_own_ids_on_the_teachers_answers(tmp_path: Path) -> None:
    config = config_of(rollout={"topk_from": "learner"}, loss={"support": "student", "direction": "reverse"})
    answers = answers_of(tmp_path / "offpolicy.jsonl", config)
    await collected(answers)
    services = Scores()
    await trained_on(config, services, answers)
    assert sum(len(share) for group in services.groups for share in group) == STEPS * 8


# --- settings that go with it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"loss": {"support": "student"}}, r"loss\.support `student`; set loss\.support to `teacher`"),
        ({"loss": {"form": "policy_gradient"}}, "policy_gradient"),
        ({"loss": {"importance_clip": 2.0}}, r"loss\.importance_clip"),
        ({"rollout": {"max_staleness": 1}}, r"rollout\.max_staleness"),
        ({"rollout": {"oversample_fraction": 0.5}}, "oversample_fraction"),
        ({"teacher": {"kind": "ema"}}, "a single teacher"),
        ({"teachers": {"other": {}}}, "a single teacher"),
        ({"teacher": {"url": "http://127.0.0.1:1"}}, r"set teacher\.model to the model that answers"),
        ({"rollout": {"source": "student"}, "loss": {"form": "nll"}}, "`nll` of the student's own answers"),
        ({"rollout": {"source": "student", "answers_file": "x"}}, r"rollout\.answers_file"),
    ],
)
def test_settings_that_do_not_go_with_the_teachers_answers_are_refused(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config_of(**sections)


def test_a_remote_teacher_needs_a_local_model_to_answer() -> None:
    assert config_of(teacher={"url": "http://127.0.0.1:1", "model": "m"}).teacher_model == "m"


def test_sequence_level_distillation_goes_with_them() -> None:
    assert config_of(loss={"form": "nll"}).answers_path == Path("runs/r/offpolicy.jsonl")


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path) -> Callable[..., Config]:
    from tests.support.runs import run_settings

    return lambda **sections: validate(Config, run_settings(tmp_path, tiny_model, **sections))


def test_games_are_not_played_by_the_teacher(make_config: Callable[..., Config], tmp_path: Path) -> None:
    from learner.data.inputs import read_inputs

    config = make_config(rollout={"source": "teacher"}, loss={"support": "teacher"})
    row = {"id": "lake", "environment": "FrozenLake", "seed": 1}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="which the teacher does not play"):
        read_inputs(config)
