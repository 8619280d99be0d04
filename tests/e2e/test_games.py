"""Whole runs on games: the played episodes are trained on, counted and evaluated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from common.data.contexts import context_index
from tests.support.runs import finish, metric_lines, started_run, write_run
from tests.support.verdicts import accuracy_of

pytestmark = pytest.mark.timeout(600)


def write_games(folder: Path, options: dict[str, Any]) -> None:
    """Six games to train on, two to validate, three to be evaluated by."""
    for name, seeds in (("train", range(6)), ("valid", range(6, 8)), ("eval", range(8, 11))):
        rows = [{"id": f"lake-{s}", "environment": "FrozenLake", "options": options, "seed": s} for s in seeds]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def step_lines(run: Path) -> list[dict[str, float]]:
    return [line for line in metric_lines(run) if "env/turns" in line]


def run_conversations(folder: Path, model: Path, environment: Mapping[str, str]) -> Path:
    config = write_run(
        folder,
        model,
        context={"text": "P is you, G the goal, H a hole."},
        rollout={"batch_size": 4, "max_tokens": 8, "stop": [], "max_staleness": 1},
        environment={"max_turns": 3, "sample_format": "conversation"},
        loss={"importance_clip": 1.5},
        learner={"steps": 4, "micro_batch_tokens": 1024},
        eval={"every": 0},
    )
    write_games(folder, {"history": False})
    with started_run(config, environment=environment) as process:
        finish(process)
    return folder / "runs/tiny"


@pytest.mark.background_run(body=run_conversations)
def test_whole_conversations_of_older_weights_weighted_by_their_ratio(finished_run: Path) -> None:
    """The game's messages are in the sequences and not in the loss, whose weights are those of prefixes."""
    run = finished_run
    lines = step_lines(run)
    trace = json.loads((run / "trace.json").read_text())
    rollouts = [event["args"] for event in trace if event["name"] == "rollout" and event["ph"] == "X"]
    in_sequences = sum(one["response_tokens"] for one in rollouts)
    assert in_sequences > 1.5 * sum(line["rollout/tokens"] for line in lines)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4]
    assert {line["staleness/max_age"] for line in lines} == {0, 1}
    for line in lines:
        assert 1 < line["env/turns"] <= 3
        # Four games of answers of at most eight tokens: the game's messages are in the sequences and not counted.
        assert 0 < line["rollout/tokens"] <= 4 * 8 * line["env/turns"]
        assert line["rollout/mean_tokens"] == line["rollout/tokens"] / 4
        assert 0 < line["importance/mean"] <= 1.5
        if line["staleness/max_age"] == 0:
            assert line["mismatch/rms"] < 2e-3
            assert abs(line["importance/mean"] - 1) < 0.01
        else:
            assert line["mismatch/rms"] > 2e-3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"]["n"] == 3


POOL = {"rules": "P is you, G the goal, H a hole.", "hint": "Keep away from H, and reach G by the shortest way."}


def run_turns(folder: Path, model: Path, environment: Mapping[str, str]) -> Path:
    config = write_run(
        folder,
        model,
        context={"text": None, "pool": str(folder / "pool.jsonl")},
        rollout={"batch_size": 4, "max_tokens": 8, "stop": []},
        environment={"max_turns": 3},
        learner={"steps": 2, "micro_batch_tokens": 1024},
        eval={"every": 0},
    )
    contexts = [json.dumps({"id": name, "text": text}) for name, text in POOL.items()]
    (folder / "pool.jsonl").write_text("\n".join(contexts))
    write_games(folder, {"history": True})
    with started_run(config, environment=environment) as process:
        finish(process)
    return folder / "runs/tiny"


@pytest.mark.background_run(body=run_turns)
def test_turns_under_contexts_of_a_pool(finished_run: Path) -> None:
    run = finished_run
    lines = step_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2]
    for line in lines:
        assert 1 <= line["env/turns"] <= 3
        assert 0 <= line["env/success"] <= line["env/reward"] <= 1
        assert line["mismatch/rms"] < 2e-3  # the engine's log-probs are of the very tokens that the learner read
        assert line["kl/lower_bound"] > 0
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [len(line["trained"]) for line in audit] == [4, 4]  # episodes
    by_sample = {one: name for line in audit for one, name in zip(line["trained"], line["contexts"], strict=True)}
    assert by_sample == {one: list(POOL)[context_index(0, one, 2)] for one in by_sample}
    assert [line["context/distinct"] for line in lines] == [len(set(line["contexts"])) for line in audit]
    played = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {line["set"] for line in played} == {"base", "in_context", "final"}
    assert len(played) == 9
    for line in played:
        assert line["context_id"] == list(POOL)[context_index(0, f"held-out/{line['id']}", 2)]
        first, *_ = line["exchanges"]
        assert "[Game]" in first["observation"]
        assert line["right"] == (line["reward"] == 1.0)
    summary = json.loads((run / "summary.json").read_text())
    won = accuracy_of([line["right"] for line in played if line["set"] == "final"])
    assert summary["final"]["accuracy"] == won.accuracy
