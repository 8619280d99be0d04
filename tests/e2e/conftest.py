"""A whole run of a tiny model as a configuration file."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

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


@pytest.fixture
def write_config(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes a run's file into the test's folder; keyword arguments are sections to change."""

    def write(**sections: dict[str, Any]) -> Path:
        return write_run(tmp_path, tiny_model, **sections)

    return write


@pytest.fixture
def teacher_process(tmp_path: Path) -> Iterator[Callable[[Path], tuple[str, int]]]:
    """Starts ``opcd teacher`` on a configuration file and waits until it is ready: (address, process id)."""
    started: list[subprocess.Popen[bytes]] = []

    def start(config: Path) -> tuple[str, int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "deploy.cli",
            "teacher",
            str(config),
            f"teacher.port={port}",
            "teacher.allow_anonymous=true",
        ]
        with (tmp_path / "teacher.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        started.append(process)
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    return url, process.pid
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError((tmp_path / "teacher.log").read_text())

    yield start
    for process in started:
        process.kill()
        process.wait()
