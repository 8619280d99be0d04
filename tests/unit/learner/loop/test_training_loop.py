"""Metrics of a step, steps that are skipped, samples as a function of their number."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.config.model import Config
from common.data.rows import DataError
from common.protocol.schema import Prompt, Sample
from learner.data.samples import SampleSource
from learner.errors import RunError
from learner.loop.run import write_skipped
from learner.loop.training_loop import TrainingLoop
from learner.trainer.reports import StepReport
from tests.support.stub_loop import ROWS, OrderedServices, config_of, loop_over


class Conversations(OrderedServices):
    """Of three response tokens an environment said one."""

    counted = 0

    def _summary(self, sample: Sample, version: int) -> Any:
        summary = super()._summary(sample, version)
        summary.student_tokens = summary.response_tokens - 1
        return summary

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        self.counted = tokens
        return await super().finish_step(tokens, sequences)


async def test_tokens_are_the_students_and_the_learner_hears_of_all_in_the_sequences() -> None:
    services, said = Conversations(), list[str]()
    loop = loop_over(services, status=said.append)
    await loop.begin(0)
    outcome = await loop.step(0)
    await loop.close()
    assert services.counted == 4 * 3
    assert outcome.metrics["rollout/tokens"] == 4 * 2
    assert outcome.metrics["rollout/mean_tokens"] == 2
    assert outcome.metrics["tokens_per_s"] * outcome.metrics["time/total_s"] == pytest.approx(4 * 2)
    assert said[-1] == "step 1: 8 tokens, learning"


async def test_a_row_that_cannot_be_rendered_in_its_turn_ends_the_run_by_its_name() -> None:
    class Rows(list[Prompt]):
        def __getitem__(self, index: Any) -> Any:
            if ROWS[index].row_id == bad:
                raise DataError(f"row {bad!r} has a system message")
            return super().__getitem__(index)

    bad = SampleSource(config_of(), ROWS)[4].prompt.row_id  # of the second step
    loop = loop_over(OrderedServices(), prompts=Rows(ROWS))
    await loop.begin(0)
    await loop.step(0)
    with pytest.raises(DataError, match=f"^row '{bad}' has a system message$"):
        await loop.step(1)
    await loop.close()


# --- steps that moved nothing ---------------------------------------------------------------------------------------


class Skips(OrderedServices):
    """Two ranks, no step of theirs is applied."""

    def __init__(self, report: Callable[[int, int], StepReport]) -> None:
        """`report`: of a rank after so many steps."""
        super().__init__()
        self.report = report
        self.steps = 0

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        self.steps += 1
        self.version = self.steps
        return [self.report(rank, self.steps) for rank in range(2)]


def loop_of(services: Skips, folder: Path, said: list[str]) -> tuple[Config, TrainingLoop]:
    """With a run's own way to keep what broke a step, under `folder`."""
    plain = config_of()
    config = plain.model_copy(
        update={
            "run": plain.run.model_copy(update={"dir": folder}),
            "learner": plain.learner.model_copy(update={"max_skipped_steps": 2}),
        }
    )
    config.run.path.mkdir(parents=True)
    record_skipped = partial(write_skipped, config.run.path / "skipped", said.append)
    return config, loop_over(services, config, record_skipped=record_skipped)


def with_nan(rank: int, steps: int) -> StepReport:
    """Rank 1 holds the bad sample."""
    bad = f"s{steps}"
    records = ({"sample_id": bad, "teacher_logprobs": ["nan"]},)
    return StepReport(steps, False, steps, {}, (bad,) * rank, records * rank)


async def test_too_many_steps_with_nan_in_a_row_end_the_run_and_their_samples_are_kept(tmp_path: Path) -> None:
    said = list[str]()
    config, loop = loop_of(Skips(with_nan), tmp_path, said)
    await loop.begin(0)
    for step in range(2):
        assert (await loop.step(step)).version == step + 1
    with pytest.raises(
        RunError, match=r"NaN or infinite for 3 steps in a row \(learner.max_skipped_steps is 2\).* s3 "
    ):
        await loop.step(2)
    await loop.close()
    for number in (1, 2, 3):
        path = config.run.path / f"skipped/step-{number:06d}.jsonl"
        assert [json.loads(line)["sample_id"] for line in path.read_text().splitlines()] == [f"s{number}"]
        assert str(path) in said[number - 1]
    assert len(said) == 3


async def test_where_only_the_gradient_is_nan_every_sample_of_the_step_is_named(tmp_path: Path) -> None:
    config, loop = loop_of(Skips(lambda rank, steps: StepReport(steps, False, steps, {})), tmp_path, [])
    await loop.begin(0)
    trained = (await loop.step(0)).trained
    await loop.step(1)
    with pytest.raises(RunError, match="samples of the last one: none by itself"):
        await loop.step(2)
    await loop.close()
    lines = (config.run.path / "skipped/step-000001.jsonl").read_text().splitlines()
    assert tuple(json.loads(line)["sample_id"] for line in lines) == trained
    assert all("the loss of no sample was" in line for line in lines)


async def test_steps_that_count_no_token_end_the_run_by_their_own_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A NaN before them is not forgotten, and they are none."""
    said, why = list[str](), "no token was counted: loss.skip_first_tokens is 9, the longest answer has 8"

    def report(rank: int, steps: int) -> StepReport:
        return StepReport(steps, False, 2, {}, uncounted=why, uncounted_in_a_row=steps)

    config, loop = loop_of(Skips(report), tmp_path, said)
    await loop.begin(0)
    await loop.step(0)
    await loop.step(1)
    with pytest.raises(RunError, match=f"{why}, for 3 steps in a row"):
        await loop.step(2)
    await loop.close()
    assert said == []
    assert not (config.run.path / "skipped").exists()
    assert [record.getMessage() for record in caplog.records] == [f"step {n} was skipped, {why}" for n in (1, 2, 3)]


# --- answers without a score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unscored", "ends"), [(1, False), (2, True)])
async def test_more_answers_without_a_score_than_allowed_end_the_run_with_the_reason(unscored: int, ends: bool) -> None:
    plain = config_of()
    config = plain.model_copy(update={"teacher": plain.teacher.model_copy(update={"max_failed_fraction": 0.25})})
    services = OrderedServices()
    source = SampleSource(config, ROWS)
    services.unscored = {source[number].sample_id for number in range(unscored)}
    loop = loop_over(services, config)
    await loop.begin(0)
    if ends:
        with pytest.raises(RunError, match=r"2 of 4 answers could not be scored, more than .* allows \(0.25\).*: no"):
            await loop.step(0)
    else:
        outcome = await loop.step(0)
        assert (len(outcome.trained), len(outcome.failed)) == (3, 1)
        assert outcome.metrics["teacher/failed"] == 1
    await loop.close()


# --- contexts made from answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("topk_from", ["engine", "learner"])
async def test_answers_that_the_function_leaves_out_are_no_failures(topk_from: str) -> None:
    plain = config_of(topk_from=topk_from)
    teacher = plain.teacher.model_copy(update={"max_failed_fraction": 0.25})
    context = plain.context.model_copy(update={"from_rollout": "m:f"})
    config = plain.model_copy(update={"teacher": teacher, "context": context})
    services = OrderedServices()
    names = [SampleSource(config, ROWS)[number].sample_id for number in range(4)]
    services.contexts = dict(zip(names, [("c0", None), (None, None), (None, "KeyError"), ("c3", None)], strict=True))
    loop = loop_over(services, config)
    await loop.begin(0)
    outcome = await loop.step(0)
    await loop.close()
    assert dict(zip(outcome.trained, outcome.contexts, strict=True)) == {names[0]: "c0", names[3]: "c3"}
    assert (outcome.failed, outcome.dropped) == ((names[2],), (names[1],))
    assert outcome.metrics["context/dropped"] == 1
    assert [span.stage for span in outcome.spans].count("context") == 2  # of the trained ones
    prepared = [item for group in services.groups for share in group for item in share]
    assert set(prepared) == ({names[0], names[3]} if topk_from == "learner" else set())


async def test_more_failed_calls_than_allowed_end_the_run_with_the_reason() -> None:
    services, config = OrderedServices(), config_of()
    services.contexts = {SampleSource(config, ROWS)[0].sample_id: (None, "context.from_rollout m:f: KeyError: 'x'")}
    loop = loop_over(services, config)
    await loop.begin(0)
    with pytest.raises(RunError, match=r"1 of 4 answers could not be scored.*context.from_rollout m:f: KeyError: 'x'"):
        await loop.step(0)
    await loop.close()


async def test_steps_without_an_answer_end_the_run(tmp_path: Path) -> None:
    class Empty(OrderedServices):
        async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
            assert (tokens, sequences) == (0, 0)
            self.version += 1
            return [
                StepReport(
                    self.version, False, 0, {}, uncounted="no token was counted", uncounted_in_a_row=self.version
                )
            ]

        def context_of(self, sample: Any) -> Any:
            return SimpleNamespace(started=1.0, ended=1.0, context_id=None, error=None)

    _, loop = loop_of(Empty(), tmp_path, [])
    await loop.begin(0)
    await loop.step(0)
    await loop.step(1)
    with pytest.raises(RunError, match=r"no answer was left to train on, for 3 steps in a row .* left them out"):
        await loop.step(2)
    await loop.close()
