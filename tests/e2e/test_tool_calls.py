"""A whole run on the documentation's calculator: conversations with tool results, of a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.runs import finish, metric_lines, started_run, without_cluster, write_run
from tests.support.tiny import TOOL_TEMPLATE


def test_conversations_with_a_calculator_are_trained_and_evaluated(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    config = write_run(
        tmp_path,
        model,
        context={"text": "Compute with the calculator."},
        rollout={"batch_size": 4, "max_tokens": 12, "stop": []},
        environment={"max_turns": 3, "sample_format": "conversation"},
        learner={"steps": 2, "micro_batch_tokens": 2048},
        eval={"every": 0},
    )
    examples = str(ROOT / "docs/examples")
    monkeypatch.syspath_prepend(examples)
    for name, first in (("train", 0), ("valid", 20), ("eval", 30)):
        rows = [{"id": f"{name}{i}", "environment": "calculator:Sums", "seed": first + i} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    environment = {**without_cluster(), "PYTHONPATH": os.pathsep.join([examples, str(ROOT), *sys.path])}
    with started_run(config, environment=environment) as process:
        finish(process)
    run = tmp_path / "runs/tiny"
    assert [line["weight_version"] for line in metric_lines(run)] == [1, 2]
    for line in metric_lines(run):
        assert 1 <= line["env/turns"] <= 3
        assert line["mismatch/rms"] < 2e-3
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12  # before, with the context and after
    for sample in samples:
        assert sample["exchanges"][0]["observation"].startswith("What is ")
        assert sample["outcome"] in ("Right.", "Wrong.", "")
