"""A whole run of a tiny model as a configuration file."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.runs import write_run


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
            "deploy.cli.main",
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
