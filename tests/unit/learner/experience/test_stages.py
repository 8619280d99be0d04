"""The stages of `opcd experience`, from problems to the run that distils, with a fake for the engine's answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from common.config.loader import load_config
from common.config.model import Config, ConfigError
from common.data.contexts import read_pool
from common.protocol.schema import Prompt, Sampling
from common.telemetry.run_files import Progress, RunFiles
from deploy.cli.main import app
from learner.data.inputs import read_inputs
from learner.experience import commands
from learner.experience.accumulate import write_pool
from learner.experience.commands import consolidation_config
from learner.experience.extract import Extraction, choose_problems, prepare_extraction, without_context
from learner.experience.select import Selection, candidates
from learner.experience.stage_files import EXTRACTED, POOL, SCORES, SELECTED, SOLVED, experience_folder
from rollout_workers.environments.episodes import Exchange
from rollout_workers.environments.playing import Played
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
QUIET = Progress(quiet=True)


@dataclass(frozen=True)
class Answer:
    """An answer as the services return it."""

    text: str
    finish_reason: str = "stop"


@dataclass
class Engine:
    """Answers by a function of the prompt's text; fails after `lasts` prompts."""

    answer: Callable[[str], str]
    lasts: int = 10**9
    asked: list[tuple[str, Sampling]] = field(default_factory=list)

    async def generate(self, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[Answer]:
        prompts = [(TOKENIZER.decode(ids), sampling) for ids, sampling in asked]
        if len(self.asked) + len(prompts) > self.lasts:
            raise ConnectionError("the engine died")
        self.asked += prompts
        return [Answer(self.answer(text)) for text, _ in prompts]

    async def play(self, asked: Sequence[tuple[Prompt, Sampling]], *, in_context: bool) -> list[Played]:
        assert not in_context
        self.asked += [(TOKENIZER.decode(prompt.student_ids.tolist()), sampling) for prompt, sampling in asked]
        return [
            Played((Exchange(f"board {prompt.game.seed}", "[up]"),), "You fell.", 0.25, False)
            for prompt, _ in asked
            if prompt.game is not None
        ]


def solve_or_extract(prompt: str) -> str:
    """Solves a problem by naming it; answers an extraction prompt with one item about the attempt."""
    if "=== Attempt ===" not in prompt:
        return f"thinking</think>I solve {prompt.split()[1]}."
    attempt = prompt.split("=== Attempt ===")[1].split("===")[0].strip()
    return f"- EXPERIENCE ITEM: no</think>- EXPERIENCE ITEM: know {attempt.removeprefix('I solve ')}"


@pytest.fixture
def path(tmp_path: Path, tiny_model: Path) -> Path:
    """A file of six raw training rows, three validation rows, two series of three problems."""
    for name, count in (("train", 6), ("valid", 3)):
        rows = [json.dumps({"id": f"{name}{i}", "prompt": f"Q: {name}{i}\nA:", "answer": f"{i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    file = tmp_path / "run.yaml"
    settings = {
        "run": {"name": "exp", "dir": str(tmp_path / "runs")},
        "student": {"model": str(tiny_model)},
        "context": {"pool": str(tmp_path / "runs/exp/experience/selected.jsonl")},
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "valid")},
        "rollout": {"batch_size": 4, "max_tokens": 64, "temperature": 0.7, "stop": ["\n"]},
        "experience": {"seeds": 2, "problems": 3, "max_tokens": 128},
        "eval": {"grader": "contains"},
    }
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture
def config(path: Path) -> Config:
    return load_config(path)


def lines(config: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (experience_folder(config.run) / name).read_text().splitlines()]


def extract(config: Config, engine: Engine) -> Extraction:
    extraction = prepare_extraction(config)
    try:
        asyncio.run(extraction.run(engine, QUIET))
    finally:
        extraction.close()
    return extraction


# --- extract ----------------------------------------------------------------------------------------------------------


def test_every_series_solves_its_problems_and_extracts_items(config: Config) -> None:
    engine = Engine(solve_or_extract)
    extraction = extract(config, engine)
    solved, extracted = lines(config, SOLVED)[1:], lines(config, EXTRACTED)[1:]
    assert [(line["seed"], line["position"]) for line in extracted] == [(s, p) for s in range(2) for p in range(3)]
    assert [line["id"] for line in solved] == [line["id"] for line in extracted]
    series = [[line["id"] for line in extracted if line["seed"] == seed] for seed in range(2)]
    assert all(len(set(one)) == 3 for one in series)
    assert series[0] != series[1]
    for line, insights in zip(solved, extracted, strict=True):
        assert line["problem"] == f"Q: {line['id']}\nA:"
        assert line["trace"] == f"I solve {line['id']}."
        assert insights["items"] == [f"know {line['id']}."]
    assert extraction.done
    assert extraction.summary() == "6 items from 6 problems (0 gave none, 0 were too long)"


def test_solving_uses_the_rows_prompts_and_extraction_has_no_stop_string(config: Config) -> None:
    engine = Engine(solve_or_extract)
    extract(config, engine)
    solving, extracting = engine.asked[:6], engine.asked[6:]
    assert all(text.startswith("Q: train") and text.endswith("\nA:") for text, _ in solving)
    assert {(one.max_tokens, one.temperature, one.stop) for _, one in solving} == {(64, 0.7, ("\n",))}
    assert {(one.max_tokens, one.temperature, one.stop) for _, one in extracting} == {(128, 0.7, ())}
    assert len({one.seed for _, one in engine.asked}) == 12


def test_the_expected_answer_is_never_shown(config: Config, path: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"id": f"r{i}", "prompt": "Q: x\nA:", "answer": f"SECRET{i}"}) for i in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    engine = Engine(solve_or_extract)
    extract(config, engine)
    assert "SECRET" not in "".join(text for text, _ in engine.asked)
    assert "SECRET" not in (experience_folder(config.run) / SOLVED).read_text()


def test_an_interrupted_extraction_resumes_to_the_same_result(config: Config, path: Path) -> None:
    with pytest.raises(ConnectionError):
        extract(config, Engine(solve_or_extract, lasts=4 + 2 + 4))  # two of the six attempts are not processed
    assert len(lines(config, SOLVED)) == 1 + 6
    assert len(lines(config, EXTRACTED)) == 1 + 4
    engine = Engine(solve_or_extract)
    extract(config, engine)
    assert len(engine.asked) == 2
    whole = load_config(path, ["run.name=whole"])
    extract(whole, Engine(solve_or_extract))
    assert lines(config, EXTRACTED) == lines(whole, EXTRACTED)
    again = prepare_extraction(config)
    assert again.done
    again.close()


def test_another_model_or_template_is_refused(config: Config, path: Path, tmp_path: Path) -> None:
    extract(config, Engine(solve_or_extract))
    with pytest.raises(ConfigError, match=r"solved\.jsonl was made from other inputs: model was"):
        prepare_extraction(load_config(path, ["experience.model=other"]))
    (tmp_path / "extract.txt").write_text("{problem} {trace}")
    with pytest.raises(ConfigError, match=r"extracted\.jsonl was made from other inputs: templates was"):
        prepare_extraction(load_config(path, [f"experience.templates={tmp_path}"]))
    more = prepare_extraction(load_config(path, ["experience.problems=4"]))  # more problems extend the file
    assert not more.done
    more.close()


def test_an_attempt_that_is_too_long_is_counted_and_not_cut(path: Path) -> None:
    config = load_config(path, ["student.max_sequence_tokens=200"])
    engine = Engine(solve_or_extract)
    extraction = extract(config, engine)
    assert len(engine.asked) == 6
    assert {line["fault"].split(", at most ")[1] for line in lines(config, EXTRACTED)[1:]} == {"200 fit"}
    assert "6 were too long" in extraction.summary()


def test_too_few_rows_are_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experience\.problems is 7, data\.train has 6 rows"):
        prepare_extraction(load_config(path, ["experience.problems=7"]))


def test_games_are_played_and_the_prompt_shows_their_end(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["data.train=game:FrozenLake?rows=4&seed=0"])
    engine = Engine(lambda prompt: f"- EXPERIENCE ITEM: {'fell' if 'You fell.' in prompt else 'nothing seen'}")
    extract(config, engine)
    assert [line["items"] for line in lines(config, EXTRACTED)[1:]] == [["fell"]] * 6
    assert all(line["problem"].startswith("board ") for line in lines(config, SOLVED)[1:])
    assert "0.25" not in (experience_folder(config.run) / SOLVED).read_text()
    shown = [text for text, _ in engine.asked[6:]]
    assert all(text.startswith("<|im_start|>user\nBelow is one game") for text in shown)


# --- accumulate and select --------------------------------------------------------------------------------------------


def test_the_pool_has_a_context_after_every_problem_of_every_series(config: Config) -> None:
    extract(config, Engine(solve_or_extract))
    assert write_pool(config) == 6
    pool = lines(config, POOL)
    assert [one["id"] for one in pool] == [f"s{s}-n{n:03d}" for s in range(2) for n in (1, 2, 3)]
    for seed in range(2):
        items = [f"- know {line['id']}." for line in lines(config, EXTRACTED)[1:] if line["seed"] == seed]
        for one, count in zip([one for one in pool if one["seed"] == seed], (1, 2, 3), strict=True):
            assert one["text"].endswith("\n".join(items[:count]) + "\n\n")  # raw rows: a prompt follows directly
            assert one["tokens"] == len(TOKENIZER(one["text"])["input_ids"])
    assert len(read_pool(experience_folder(config.run) / POOL)) == 6


def test_the_cap_applies_to_the_whole_text(config: Config, path: Path) -> None:
    extract(config, Engine(solve_or_extract))
    write_pool(config)
    of_one, of_two = (one["tokens"] for one in lines(config, POOL)[:2])
    write_pool(load_config(path, [f"experience.max_context_tokens={of_two}"]))
    assert [(one["items"], one["dropped"]) for one in lines(config, POOL)[:3]] == [(1, 0), (2, 0), (2, 1)]
    with pytest.raises(ConfigError, match=r"fits into experience\.max_context_tokens"):
        write_pool(load_config(path, [f"experience.max_context_tokens={of_one - 1}"]))


def test_a_random_selection_is_a_pool_for_a_run(config: Config, path: Path) -> None:
    extract(config, Engine(solve_or_extract))
    write_pool(config)
    two = load_config(path, ["experience.keep=2"])
    assert commands.select(two) == 0
    selected = lines(config, SELECTED)
    assert [one["id"] for one in selected] == candidates(two.run, two.experience)
    assert selected == [one for one in lines(config, POOL) if one["id"] in candidates(two.run, two.experience)]
    run = consolidation_config(config)
    assert run.context == config.context  # the configuration names the file that the stage wrote
    rendered = config.context.model_copy(update={"placement": "user_prefix", "chat_template_kwargs": {"think": True}})
    assert consolidation_config(config.model_copy(update={"context": rendered})).context == rendered
    sampler = read_inputs(run).context_sampler
    assert sampler is not None
    assert {sampler(0, f"{key}").context_id for key in range(30)} == set(candidates(two.run, two.experience))


def test_selection_keeps_the_contexts_with_the_highest_accuracy(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["experience.select=validation", "experience.keep=2"])
    extract(config, Engine(solve_or_extract))
    write_pool(config)
    # A context with n items makes n of the three rows right, so the longest lists win.
    engine = Engine(
        lambda prompt: (
            prompt.split("Q: valid")[1][0] if prompt.count("- know") > int(prompt.split("Q: valid")[1][0]) else "?"
        )
    )
    selection = Selection(config)
    with RunFiles(tmp_path / "select") as files:
        asyncio.run(selection.run(engine, files, QUIET))
    assert selection.done
    assert selection.keep() == ["s0-n003", "s1-n003"]
    selection.close()
    assert [(line["id"], round(line["accuracy"], 2)) for line in lines(config, SCORES)[1:]] == [
        (f"s{s}-n{n:03d}", round(n / 3, 2)) for s in range(2) for n in (1, 2, 3)
    ]
    assert [one["id"] for one in lines(config, SELECTED)] == ["s0-n003", "s1-n003"]
    again = Selection(config)
    assert again.done
    again.close()
    answers = [json.loads(line) for line in (tmp_path / "select/samples.jsonl").read_text().splitlines()]
    assert {line["context_id"] for line in answers} == {one["id"] for one in lines(config, POOL)}


def test_selection_resumes_and_tries_candidates_only(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["experience.select=validation", "experience.candidates=3"])
    extract(config, Engine(solve_or_extract))
    write_pool(config)
    tried = candidates(config.run, config.experience)
    assert len(tried) == 3
    selection = Selection(config)
    with RunFiles(tmp_path / "select") as files:
        with pytest.raises(ConnectionError):
            asyncio.run(selection.run(Engine(lambda prompt: "?", lasts=3 + 3), files, QUIET))
        assert [line["id"] for line in lines(config, SCORES)[1:]] == tried[:2]
        engine = Engine(lambda prompt: "?")
        asyncio.run(selection.run(engine, files, QUIET))
    assert len(engine.asked) == 3
    assert selection.keep() == tried[:1]  # the first wins a tie
    selection.close()
    with pytest.raises(ConfigError, match=r"data\.valid is not set"):
        Selection(load_config(path, ["data.valid=null"]))


def test_a_stage_without_its_input_names_the_command(config: Config) -> None:
    with pytest.raises(ConfigError, match="run `opcd experience extract` first"):
        write_pool(config)
    with pytest.raises(ConfigError, match="run `opcd experience accumulate` first"):
        candidates(config.run, config.experience)
    with pytest.raises(ConfigError, match="run `opcd experience select` first"):
        consolidation_config(config)


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_each_round_starts_from_the_student_of_the_last_round(
    config: Config, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, str]] = []

    def stage(name: str) -> Callable[..., int]:
        def run(one: Config, **flags: bool) -> int:
            calls.append((name, one.run.name, one.student.model))
            if name == "consolidate":
                one.run.path.mkdir(parents=True)
                (one.run.path / "summary.json").write_text('{"outcome": "finished"}')
            return 0

        return run

    for name in ("extract", "accumulate", "select", "consolidate"):
        monkeypatch.setattr(commands, name, stage(name))
    stages = ("extract", "accumulate", "select", "consolidate")
    first = str(config.run.path / "round-1" / "checkpoint")
    assert commands.rounds(config, 1) == 0
    assert calls == [(name, "round-1", config.student.model) for name in stages]
    calls.clear()
    assert commands.rounds(config, 2) == 0  # the finished round is skipped
    assert calls == [(name, "round-2", first) for name in stages]
    calls.clear()
    assert CliRunner().invoke(app, ["experience", "rounds", str(path), "--rounds", "3"]).exit_code == 0
    assert [name for _, name, _ in calls] == ["round-3"] * 4
    adapters = load_config(path, ["learner.lora.publish=adapter"])
    with pytest.raises(ConfigError, match="must be `merged`"):
        commands.rounds(adapters, 2)


def test_a_round_that_fails_ends_all(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "extract", lambda one: 130)
    assert commands.rounds(config, 2) == 130


def test_problems_are_a_function_of_the_runs_seed(config: Config, path: Path) -> None:
    from common.data.rows import read_rows

    def ids(one: Config) -> list[tuple[int, str]]:
        rows = read_rows(one.data.train)
        return [
            (problem.seed, problem.row.id)
            for problem in choose_problems(one.experience, one.run.seed, rows, read_inputs(without_context(one)).train)
        ]

    assert ids(config) == ids(config)
    assert ids(config) != ids(load_config(path, ["run.seed=1"]))
