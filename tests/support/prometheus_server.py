"""A real Prometheus that scrapes a page, if it is installed (Debian: ``prometheus``)."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

PROGRAM = shutil.which("prometheus")


@contextmanager
def scraping(target: str, folder: Path, port: int) -> Iterator[str]:
    """The address of a Prometheus on loopback that scrapes ``host:port`` every second until the end."""
    assert PROGRAM is not None
    settings = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "opcd-run", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    url = f"127.0.0.1:{port}"
    command = [
        PROGRAM,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={url}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://{url}"
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str, query: str) -> list[dict[str, Any]]:
    """Series that a query finds; raises httpx.HTTPStatusError where Prometheus refuses it."""
    reply = httpx.post(f"{url}/api/v1/query", data={"query": query}, trust_env=False).raise_for_status().json()
    return list(reply["data"]["result"])


def wait_until_found(url: str, query: str, seconds: float) -> None:
    """Returns when the query finds something; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if answers(url, query):
                return
        except httpx.TransportError:
            pass  # it is still starting
        time.sleep(0.3)
    raise AssertionError(f"{query} found nothing within {seconds} s")
