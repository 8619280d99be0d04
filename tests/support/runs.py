"""Whole runs of a tiny model: their configuration file, their process, their metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


@contextmanager
def started_run(config: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m learner.train`` as a user starts it, in a process group of its own."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; its children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "learner.train", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_step(run: Path, process: subprocess.Popen[str], step: int) -> None:
    """Until ``metrics.jsonl`` has the line of `step`."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and any("kl/lower_bound" in line and f'"step": {step},' in line for line in path.open()):
            return
        time.sleep(0.1)
    raise AssertionError(f"the run ended early: {process.communicate()}")


def metric_lines(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "kl/lower_bound" in line]


WORDS = ("cat", "dog", "sun", "map", "cup", "hat", "pen", "box", "key", "car", "bus", "bed")


def run_settings(folder: Path, model: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run in seconds: 12 raw rows, a context that changes the random model's distribution."""
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
    """The configuration file of `run_settings`, with its data."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_settings(folder, model, **sections)))
    return path
