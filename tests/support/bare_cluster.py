"""A Ray cluster of two nodes on this machine, whose Python has all of opcd's dependencies and not opcd itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.processes import alive, descendants, free_port
from tests.support.ray_nodes import SAME_PRIORITY


@dataclass(frozen=True)
class BareCluster:
    """Address, token and processes of the cluster."""

    address: str
    token_file: Path
    processes: tuple[int, ...]
    """The two ``ray start``."""


def make_bare_environment(folder: Path) -> Path:
    """A virtual environment that shares this one's packages, by links, except opcd; returns its ``bin``."""
    venv.create(folder, symlinks=True, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("opcd", "__editable__")) and path.name != "__pycache__":
            (packages / path.name).symlink_to(path)
    python, pip = folder / "bin/python", folder / "bin/pip"
    pip.write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    pip.chmod(0o755)
    return folder / "bin"


@contextmanager
def bare_cluster(folder: Path, **node_variables: str) -> Iterator[BareCluster]:
    """A head without GPUs and a second node that says it has two, with ``node_variables`` in both environments.

    The second has the resource ``second``. Requests need the token. Nothing is left of them afterwards.
    """
    binaries = make_bare_environment(folder / "environment")
    token_file = folder / "token"
    token_file.write_text("a-token-of-at-least-32-characters-for-tests")
    gcs, dashboard = free_port(), free_port()
    path = os.pathsep.join([str(binaries), os.environ["PATH"].replace(str(Path(sys.executable).parent), "")])
    own = {"PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file), **SAME_PRIORITY}
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))}
    start = [str(binaries / "python"), "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    head = [f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--num-gpus=0", "--head"]
    second = [f"--address=127.0.0.1:{gcs}", "--num-cpus=2", "--num-gpus=2", '--resources={"second": 1}']
    # Nodes that share a folder take each other's installed wheels away. Sockets lie in it: its path must be short.
    folders = [tempfile.mkdtemp(prefix="ray-", dir="/tmp") for _ in range(2)]
    for options, scratch in zip((head, second), folders, strict=True):
        options += [f"--temp-dir={scratch}", f"--dashboard-agent-listen-port={free_port()}"]
    started: list[subprocess.Popen[bytes]] = []
    address = f"http://127.0.0.1:{dashboard}"
    try:
        with (folder / "ray.log").open("wb") as log:
            started.extend(  # the second waits for the head by itself
                subprocess.Popen(
                    [*start, *options], env=variables | own | node_variables, cwd=folder, stdout=log, stderr=log
                )
                for options in (head, second)
            )
        wait_for_nodes(address, token_file, len(started))
        yield BareCluster(address, token_file, tuple(process.pid for process in started))
    except AssertionError:
        print((folder / "ray.log").read_text())
        raise
    finally:
        stop([process.pid for process in started])
        for process in started:
            process.wait(10)
        for scratch in folders:
            shutil.rmtree(scratch, ignore_errors=True)


def wait_for_nodes(address: str, token_file: Path, count: int) -> None:
    """Until the dashboard knows of `count` living nodes."""
    headers = {"Authorization": f"Bearer {token_file.read_text()}"}
    for _ in range(900):  # a busy machine takes more than a minute
        try:
            reply = httpx.get(f"{address}/api/v0/nodes", headers=headers, trust_env=False)
            if reply.status_code == 200:
                nodes = reply.json()["data"]["result"]["result"]
                if sum(node["state"] == "ALIVE" for node in nodes) == count:
                    return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{count} nodes did not come up at {address}")


def stop(roots: list[int]) -> None:
    """End processes and all that they started: in order, else by force."""
    pids = set(roots).union(*(descendants(root) for root in roots))
    for root in roots:
        os.kill(root, signal.SIGTERM)
    deadline = time.monotonic() + 3
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in alive(pids):
        os.kill(pid, signal.SIGKILL)
