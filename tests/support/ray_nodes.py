"""A Ray cluster on this machine: a head, and three nodes with room for a rollout worker each, one of them to spare.

The nodes say that they have a GPU, which nobody uses: workers ask for it, so no two share a node. The learner and the
teacher may lie anywhere.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import alive, command_of, descendants, parent_of
from tests.support.teacher_running import free_port

WORKER_NODES = 3
SETTING = "rollout.gpus_per_worker=1"
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


@contextmanager
def worker_nodes() -> Iterator[dict[str, str]]:
    """The cluster; gives the environment variables of a driver that is to join it. Nothing of it is left behind."""
    gcs, scratch = free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it: a short path
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["RAY_AUTH_MODE"] = "disabled"
    head = ["--head", f"--port={gcs}", f"--temp-dir={scratch}", "--include-dashboard=false", "--num-gpus=0"]
    other = [f"--address=127.0.0.1:{gcs}", "--num-gpus=1"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for options in (head, *[other] * WORKER_NODES):
            command = [*START, *options, "--num-cpus=1", f"--dashboard-agent-listen-port={free_port()}"]
            with Path(scratch, "start.log").open("ab") as log:
                started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))
            _wait_for_raylet(started[-1], Path(scratch, "start.log"))
        yield {**variables, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        pids = {one.pid for one in started}.union(*(descendants(one.pid) for one in started))
        for one in reversed(started):
            one.terminate()
        deadline = time.monotonic() + 10
        while alive(pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in alive(pids):
            os.kill(pid, signal.SIGKILL)
        for one in started:
            one.wait(10)
        shutil.rmtree(scratch, ignore_errors=True)


def raylet_of_a_remote_worker() -> int:
    """Process id of the raylet under a rollout worker that shares its node with no part of the learner."""
    workers = [pid for pid in descendants(1) if command_of(pid).startswith("ray::RolloutWorker")]
    ranks = [pid for pid in descendants(1) if command_of(pid).startswith("ray::LearnerRank")]
    of_learner = {parent_of(pid) for pid in ranks}
    return min(raylet for raylet in map(parent_of, workers) if raylet not in of_learner)


def drain(node: str) -> None:
    """Tell Ray that `node` will be taken away in an hour. Its actors go on meanwhile; no new ones are placed there."""
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=3600"]
    address = f"--address={os.environ['RAY_ADDRESS']}"
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", address, f"--node-id={node}", *reason], check=True
    )


def _wait_for_raylet(started: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if any("raylet/raylet" in command_of(pid) for pid in descendants(started.pid)):
            return
        if started.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(log.read_text())
