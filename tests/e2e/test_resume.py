"""Checkpoints of whole runs: a run that was cut off ends where it would have ended, or says why it cannot."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.runs import metric_lines, started_run, wait_for_step

pytestmark = pytest.mark.timeout(600)

SECTIONS = {
    "learner": {"steps": 4, "deterministic": True},
    "checkpoint": {"every": 1, "keep": 2, "export_every": 2, "export_at": [1]},
    "eval": {"every": 2},
}


def weights_of(run: Path) -> str:
    return hashlib.sha256((run / "checkpoint/model.safetensors").read_bytes()).hexdigest()


def test_a_run_that_was_killed_resumes_to_the_same_bits(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(**SECTIONS)
    # The name is part of every answer's seed, the folder is not.
    cut, whole = tmp_path / "cut/tiny", tmp_path / "whole/tiny"
    in_cut = f"run.dir={cut.parent}"
    with started_run(config, f"run.dir={whole.parent}") as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    with started_run(config, in_cut) as process:
        wait_for_step(cut, process, 2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list((cut / "checkpoints").glob("step-*[0-9]"))
    with started_run(config, in_cut, "--resume") as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "resumed from" in output
    assert weights_of(cut) == weights_of(whole)
    assert [line["weight_version"] for line in metric_lines(cut)] == [1, 2, 3, 4]
    assert [line["kl/lower_bound"] for line in metric_lines(cut)] == [
        line["kl/lower_bound"] for line in metric_lines(whole)
    ]
    resumed, through = (json.loads((run / "summary.json").read_text()) for run in (cut, whole))
    for name in ("base", "in_context", "final", "best_on_valid", "kl_first", "kl_last", "steps"):
        assert resumed[name] == through[name], name
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert sorted(path.name for path in (whole / "exports").iterdir()) == ["step-000001", "step-000002", "step-000004"]
    best = json.loads((whole / "best/best.json").read_text())
    assert best == through["best_on_valid"]
    assert (whole / "best/model.safetensors").exists()

    # The same folder again: neither overwritten by accident, nor continued as another run.
    with started_run(config, in_cut) as process:
        _, errors = process.communicate()
    assert process.returncode == 2
    assert "holds a checkpoint of step 4: --resume" in errors
    with started_run(config, in_cut, "loss.top_k=32", "--resume") as process:
        _, errors = process.communicate()
    assert process.returncode == 2
    assert "loss.top_k: the checkpoint has 64, this run has 32" in errors
    assert "Traceback" not in errors
