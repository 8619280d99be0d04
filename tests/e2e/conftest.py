"""The configuration file of a tiny model's run, and a teacher server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.processes import free_port
from tests.support.runs import write_run


@pytest.fixture
def write_config(tmp_path: Path, tiny_model: Path) -> Callable[..., Path]:
    """Writes a run's file into the test's folder; keyword arguments are changed sections."""

    def write(**sections: dict[str, Any]) -> Path:
        return write_run(tmp_path, tiny_model, **sections)

    return write


@pytest.fixture(scope="module")
def teacher_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], tuple[str, int]]]:
    """Starts ``opcd teacher`` on a configuration file and waits until it is ready: (address, process id)."""
    started: list[subprocess.Popen[bytes]] = []
    output = tmp_path_factory.mktemp("teacher") / "teacher.log"

    def start(config: Path) -> tuple[str, int]:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "deploy.cli.main", "teacher", str(config)]
        with output.open("wb") as log:
            process = subprocess.Popen(
                [*command, f"teacher.port={port}", "teacher.allow_anonymous=true"], stdout=log, stderr=log
            )
        started.append(process)
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    return url, process.pid
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(output.read_text())

    yield start
    for process in started:
        process.kill()
        process.wait()
