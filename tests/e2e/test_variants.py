"""Whole runs in the other ways that a configuration can ask for, as many of them at once as go together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import metric_lines, started_run
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.timeout(600)


def test_two_workers_two_ranks_four_teachers_and_the_learners_own_topk_running_ahead(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Both sides' ids are the support, the student's part picked by the learner."""
    big = make_tiny_model(tmp_path / "big", hidden=128, seed=3)
    config = write_config(
        rollout={"workers": 2, "samples_per_prompt": 2, "topk_from": "learner", "max_staleness": 1},
        loss={"support": "union", "top_k": 32},
        learner={"ranks": 2, "steps": 4},
        teachers={
            "big": {"model": str(big), "threads": 1},
            "live": {"kind": "live", "threads": 1},
            "average": {"kind": "ema", "ema_decay": 0.5, "threads": 1},
        },
        eval={"every": 0},
    )
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for row, name in zip(rows, ["big", "live", "average", None] * 2, strict=True):
        row["teacher"] = name
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with started_run(config) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    run = tmp_path / "runs/tiny"
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert 0 < line["topk_overlap"] < 1
        assert 0 < line["mass/student_topk"] <= 1
        assert line["staleness/max_age"] <= 1
    agreements = [line for line in lines if "topk_agreement" in line]
    assert agreements
    for line in agreements:  # with the same weights engine and learner rank alike, ties and last bits apart
        assert line["topk_agreement"] > (0.95 if line["staleness/max_age"] == 0 else 0.3)
    assert max(line["staleness/mean_age"] for line in lines) > 0
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [len(line["trained"]) for line in audit] == [16] * 4
    assert Counter(sample for line in audit for sample in line["trained"]).most_common(1)[0][1] == 1
    trace = json.loads((run / "trace.json").read_text())
    tracks = {event["args"]["name"] for event in trace if event["name"] == "process_name"}
    assert tracks >= {"worker 0", "worker 1", "rank 0", "rank 1", "teacher", "controller"}
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["trainer_idle_ratio"] <= 1


def test_adapters_learn_from_the_base_model_inside_the_learner_over_a_shared_folder(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """LoRA, no teacher server, weights as files, the learner's own top-k, which is all; cut off and resumed."""
    config = write_config(
        learner={"steps": 4, "lora": {"rank": 8, "publish": "adapter"}},
        teacher={"kind": "base"},
        rollout={"topk_from": "learner"},
        loss={"form": "exact", "top_k": 512},
        sync={"backend": "file"},
        checkpoint={"every": 2},
        eval={"every": 0},
    )
    run = tmp_path / "runs/tiny"
    with started_run(config, "learner.steps=2") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    with started_run(config, "--resume") as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "resumed from" in output
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["kl/lower_bound"] < lines[0]["kl/lower_bound"]
    for line in lines:
        assert line["mass/student_topk"] == pytest.approx(1, abs=1e-5)
        assert line["kl/tail"] == pytest.approx(0, abs=1e-9)
        assert line["loss"] == pytest.approx(line["kl/support"], rel=1e-5)
    assert max(line["parity/max_nats"] for line in lines) <= 2e-4
    assert (run / "checkpoint/adapter_model.safetensors").exists()
    stages = {key for line in lines for key in line if key.startswith("time/")}
    assert "time/score_s" in stages
