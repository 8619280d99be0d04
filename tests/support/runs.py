"""Whole runs of a tiny model: configuration file, process, metrics."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.processes import descendants, free_port


@contextmanager
def started_run(
    config: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    faults: str | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[subprocess.Popen[str]]:
    """``python -m learner.train`` as a user starts it, in a separate process group.

    It starts a Ray cluster, unless `environment` has the address of one. With `faults` the run is that of
    `tests.support.fault_driver`. `prefix` are words before the command.
    """
    module = ["learner.train"] if faults is None else ["tests.support.fault_driver", faults]
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", *module, str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=without_cluster() if environment is None else environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def without_cluster() -> dict[str, str]:
    """This process's environment without the address of a Ray cluster."""
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}


def finish(process: subprocess.Popen[str], *, status: int = 0) -> str:
    """Wait for the end of a run, which must have `status`; returns all that it printed."""
    printed = "".join(process.communicate())
    if process.returncode != status:
        pytest.fail(f"status {process.returncode}, not {status}:\n{printed}")  # an assertion would shorten it
    return printed


def wait_for_step(run: Path, process: subprocess.Popen[str], step: int) -> None:
    """Wait until ``metrics.jsonl`` has the line of `step`."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any("kl/lower_bound" in line and f'"step": {step},' in line for line in path.open()):
            return
        time.sleep(0.05)
    raise AssertionError(f"the run ended early: {process.communicate()}")


@dataclass(frozen=True)
class ReferenceRun:
    """A finished deterministic run, which the tests of resumed and disturbed runs compare with."""

    config: Path
    run: Path
    """Its folder."""
    output: str
    metrics_page: str
    """Prometheus page after the first step."""
    processes: set[int]
    """The run's child processes."""


def reference_run(folder: Path, model: Path) -> ReferenceRun:
    """Run `REFERENCE` to its end."""
    config, port = write_run(folder, model, **REFERENCE), free_port()
    run = folder / "runs/tiny"
    with started_run(config, f"run.metrics_port={port}") as process:
        wait_for_step(run, process, 1)
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        processes = descendants(process.pid)
        output = finish(process)
    return ReferenceRun(config, run, output, page, processes)


def weights_of(run: Path) -> str:
    """Hash of the final weights."""
    return hashlib.sha256((run / "checkpoint/model.safetensors").read_bytes()).hexdigest()


def metric_lines(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "kl/lower_bound" in line]


REFERENCE: dict[str, dict[str, Any]] = {
    "learner": {"deterministic": True},
    "checkpoint": {"every": 1, "keep": 2, "export_every": 2, "export_at": [1]},
    "sync": {"timeout_s": 30},
}
"""Sections of the configuration of `reference_run`."""
WORDS = ("cat", "dog", "sun", "map", "cup", "hat", "pen", "box", "key", "car", "bus", "bed")


def run_settings(folder: Path, model: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of seconds: 12 raw rows, and a context that changes the random model's distribution."""
    for name, words in (("train", WORDS[:8]), ("valid", WORDS[4:8]), ("eval", WORDS[8:])):
        lines = [json.dumps({"id": word, "prompt": f"Q: {word}\nA:", "answer": "x"}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "student": {"model": str(model)},
        "teacher": {"threads": 1},
        "context": {"text": "Q: one\nA: ones\n"},
        "data": {name: str(folder / f"{name}.jsonl") for name in ("train", "valid", "eval")},
        "rollout": {"batch_size": 8, "max_tokens": 8, "stop": ["\n"], "threads": 1, "max_num_seqs": 16},
        "loss": {"top_k": 64},
        "learner": {"steps": 6, "lr": 3e-3, "threads": 1, "micro_batch_tokens": 64},
        "sync": {"probe_prompts": 4, "probe_tokens": 16},
        "eval": {"every": 3, "grader": "contains"},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return settings


def write_run(folder: Path, model: Path, **sections: dict[str, Any]) -> Path:
    """Write the configuration file of `run_settings`, and its data."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_settings(folder, model, **sections)))
    return path
