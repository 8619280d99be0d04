"""Held-out evaluation against stub services: requested answers, and the reported results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from common.config.loader import validate
from common.config.model import Config, ConfigError
from common.data.rows import DataError
from common.evaluation.accuracy import Accuracy, pass_at_1
from common.protocol.schema import Sampling, TokenSequence
from common.telemetry.run_files import Progress, RunFiles
from learner.cluster.services import Services
from learner.data.inputs import read_inputs
from learner.evaluation.held_out import HeldOutEvaluator, gap_warning
from learner.evaluation.summary import RunSummary, final_table, summary_json
from tests.support.runs import run_settings


@dataclass
class StubServices:
    """Answers prompts with `answer`; predicts texts at `nats` a token."""

    answer: Callable[[list[int], Sampling], str]
    nats: float = 2.0
    finish_reason: str = "stop"
    asked: list[tuple[list[int], Sampling]] = field(default_factory=list)

    async def generate(self, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[Any]:
        self.asked += [(list(ids), sampling) for ids, sampling in asked]
        return [
            SimpleNamespace(text=self.answer(list(ids), sampling), finish_reason=self.finish_reason, ids=[])
            for ids, sampling in asked
        ]

    async def probe_learner(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        return [np.full(len(one.response_ids), -self.nats, np.float32) for one in sequences]


async def forever(step: int) -> None:
    await asyncio.Event().wait()


@dataclass
class Judged:
    """A run that is only evaluated."""

    config: Config
    services: StubServices
    summary: RunSummary = field(default_factory=lambda: RunSummary(planned_steps=2))

    async def run(self, after: Callable[[list[int], Sampling], str], nats: float = 2.0) -> None:
        inputs = read_inputs(self.config)
        with RunFiles(self.config.run.path) as files:
            held_out = HeldOutEvaluator(
                self.config, cast(Services, self.services), inputs, files, Progress(), self.summary, forever
            )
            await held_out.before()
            await held_out.in_context()
            held_out.warn_if_no_gap()
            self.services.answer, self.services.nats = after, nats
            await held_out.after(2)

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.config.run.path / name).read_text().splitlines()]


@pytest.fixture
def configured(tmp_path: Path, tiny_model: Path) -> Callable[..., Config]:
    def make(**sections: dict[str, Any]) -> Config:
        return validate(Config, run_settings(tmp_path, tiny_model, **sections))

    return make


def knows(*words: str) -> Callable[[list[int], Sampling], str]:
    """Right for the prompts of `words`, and for every prompt with the context, which is longer."""
    lengths = {len(f"Q: {word}\nA:") for word in words}
    return lambda ids, sampling: "x" if len(ids) > 12 or len(ids) in lengths else "-"


async def test_each_answer_has_its_own_seed_equal_before_and_after(configured: Callable[..., Config]) -> None:
    config = configured(eval={"samples": 3, "temperature": 0.7, "top_p": 0.8, "top_k": 20})
    judged = Judged(config, StubServices(knows()))
    await judged.run(knows("pens"))
    asked = judged.services.asked
    assert len(asked) == 3 * 4 * 3
    before, in_context, after = asked[:12], asked[12:24], asked[24:]
    assert len({sampling.seed for _, sampling in before}) == 12
    assert [s.seed for _, s in before] == [s.seed for _, s in after] == [s.seed for _, s in in_context]
    assert before == after
    assert {(s.temperature, s.top_p, s.top_k, s.top_logprobs) for _, s in asked} == {(0.7, 0.8, 20, 0)}
    assert all(len(longer[0]) > len(bare[0]) for longer, bare in zip(in_context, before, strict=True))
    lines = judged.lines("samples.jsonl")
    assert [line["sample"] for line in lines[:4]] == [0, 1, 2, 0]
    base = summary_json(judged.summary)["base"]
    assert {k: found["value"] for k, found in base.pop("pass_at").items()} == {"2": 0.0, "3": 0.0}
    assert base == {
        "accuracy": 0.0,
        "n": 4,
        "ci95": list(judged.summary.base.ci95) if judged.summary.base else None,
        "samples": 3,
    }


async def test_greedy_answers_have_no_seed(configured: Callable[..., Config]) -> None:
    judged = Judged(configured(), StubServices(knows()))
    await judged.run(knows())
    assert {(s.temperature, s.seed, s.top_k) for _, s in judged.services.asked} == {(0.0, None, 0)}


def test_few_rows_cannot_tell_and_many_can() -> None:
    def accuracy(rows: int, right: int) -> Accuracy:
        return pass_at_1({str(row): [row < right] for row in range(rows)})

    assert (gap_warning(accuracy(14, 5), accuracy(14, 6)) or "").startswith("14 rows cannot tell")
    assert (gap_warning(accuracy(400, 100), accuracy(400, 100)) or "").startswith("there is nothing to distil")
    assert (gap_warning(accuracy(400, 100), accuracy(400, 60)) or "").startswith("there is nothing to distil")
    assert gap_warning(accuracy(400, 100), accuracy(400, 200)) is None


@pytest.mark.parametrize("key", ["samples", "top_k", "top_p"])
def test_greedy_answers_cannot_differ(configured: Callable[..., Config], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval\.{key} \({0.5 if key == 'top_p' else 4}\)"):
        configured(eval={key: 0.5 if key == "top_p" else 4})


async def test_no_warning_if_the_context_helps(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    await Judged(configured(), StubServices(knows())).run(knows())
    assert "WARNING" not in capsys.readouterr().out


async def test_a_context_that_changes_nothing_is_a_warning_with_the_numbers(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    judged = Judged(configured(), StubServices(lambda ids, sampling: "-"))
    await judged.run(knows())
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert (
        "4 rows cannot tell whether there is anything to distil: 0.000 right with the context, 0.000 without, a gap of "
        "+0.000 (-0.462 to +0.462, n = 4); use more rows in data.eval" in warning
    )
    assert summary_json(judged.summary)["gap_closed_ci95"] is None


async def test_forgetting_is_in_the_summary(configured: Callable[..., Config], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": word, "prompt": f"{word}?", "answer": "y"} for word in ("one", "three", "seventeen")
    ]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 4)
    config = configured(
        eval={
            "ood": {"other": str(tmp_path / "other.jsonl")},
            "perplexity": {"fox": str(tmp_path / "text.txt")},
            "perplexity_chunk_tokens": 16,
        }
    )
    inputs = read_inputs(config)
    assert all(len(chunk.response_ids) <= 15 for chunk in inputs.texts["fox"])
    judged = Judged(config, StubServices(lambda ids, sampling: "y"))
    await judged.run(lambda ids, sampling: "y" if len(ids) < 6 else "-", nats=2.5)
    found = summary_json(judged.summary)
    assert found["ood"]["other"]["before"]["accuracy"] == 1.0
    assert found["ood"]["other"]["after"]["accuracy"] == pytest.approx(1 / 3)
    assert found["ood"]["other"]["change"] == pytest.approx(-2 / 3)
    assert found["ood"]["other"]["ci95"][0] < -2 / 3 < found["ood"]["other"]["ci95"][1]
    assert found["perplexity"]["fox"]["change"] == pytest.approx(0.5)
    assert found["perplexity"]["fox"]["ci95"] == pytest.approx((0.5, 0.5))
    assert "change on other" in final_table(judged.summary)
    rows_of = json.loads((config.run.path / "accuracy.json").read_text())
    assert rows_of["ood/other/after"] == {"one": 1.0, "three": 0.0, "seventeen": 0.0}
    assert set(rows_of) == {"base", "in_context", "final", "ood/other/before", "ood/other/after"}
    metrics = [line for line in judged.lines("metrics.jsonl") if "nats_per_token/fox" in line]
    assert [(line["step"], line["nats_per_token/fox"]) for line in metrics] == [(0, 2.0), (2, 2.5)]


def test_rows_of_other_tasks_add_no_context(configured: Callable[..., Config], tmp_path: Path) -> None:
    """A chat row of another task adds no context."""
    row = {"id": "a", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "y"}
    (tmp_path / "other.jsonl").write_text(json.dumps(row))
    inputs = read_inputs(configured(eval={"ood": {"other": str(tmp_path / "other.jsonl")}}))
    assert set(inputs.contexts) == {row.context for row in inputs.eval}


async def test_a_resumed_run_reports_earlier_measurements(configured: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three")
    config = configured(
        eval={"perplexity": {"t": str(tmp_path / "text.txt")}, "ood": {"o": str(tmp_path / "eval.jsonl")}}
    )
    judged = Judged(config, StubServices(knows()))
    await judged.run(knows())
    state = json.loads(json.dumps(judged.summary.state()))
    again = RunSummary(planned_steps=2)
    again.restore(state)
    assert summary_json(again) | {"outcome": 0} == summary_json(judged.summary) | {"outcome": 0}
    assert again.row_scores() == judged.summary.row_scores()


def test_a_text_that_cannot_be_read_is_named_before_anything_starts(
    configured: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    for name in ("empty.txt", "absent.txt"):
        with pytest.raises(DataError, match=rf"eval\.perplexity: .*{name}"):
            read_inputs(configured(eval={"perplexity": {"t": str(tmp_path / name)}}))


def test_a_row_of_another_task_that_is_too_long_is_named(configured: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"id": "cat", "prompt": "x" * 200, "answer": "y"}))
    config = configured(student={"max_sequence_tokens": 100}, eval={"ood": {"other": str(tmp_path / "other.jsonl")}})
    with pytest.raises(DataError, match=r"eval\.ood\.other: row 'cat': 208 student tokens"):
        read_inputs(config)


async def test_answers_that_mostly_reach_the_limit_are_a_warning(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    services = StubServices(knows())
    services.finish_reason = "length"
    await Judged(configured(rollout={"max_tokens": 8}), services).run(knows())
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    named = [
        line.partition("100% of the answers of ")[2].partition(" did not end within 8 tokens")[0] for line in warnings
    ]
    assert named == ["in_context", "final"]  # not of the untrained student without the context
