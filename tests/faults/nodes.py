"""A Ray cluster of three nodes on this machine: a head that holds the learner, the teacher and one rollout worker, and
two more nodes with room for a worker each, one of them to spare.

The nodes say that they have GPUs, which nobody uses: asking for them is how a run's parts are sent to a node.
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
from typing import Any

from tests.processes import alive, command_of, descendants, parent_of
from tests.teacher_running import free_port

WORKER_GPUS = 3
SECTIONS: dict[str, dict[str, Any]] = {
    "teacher": {"gpus": 1},
    "learner": {"gpus_per_rank": 1},
    "rollout": {"gpus_per_worker": WORKER_GPUS},
}
"""What a run asks for: only the head has room for more than a worker, and for no more than one."""
HEAD_GPUS = WORKER_GPUS + 2
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


@contextmanager
def three_nodes() -> Iterator[dict[str, str]]:
    """The cluster; gives the environment variables of a driver that is to join it. Nothing of it is left behind."""
    gcs, scratch = free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it: a short path
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables["RAY_AUTH_MODE"] = "disabled"
    head = ["--head", f"--port={gcs}", f"--temp-dir={scratch}", "--include-dashboard=false", f"--num-gpus={HEAD_GPUS}"]
    other = [f"--address=127.0.0.1:{gcs}", f"--num-gpus={WORKER_GPUS}"]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for options in (head, other, other):
            command = [*START, *options, "--num-cpus=2", f"--dashboard-agent-listen-port={free_port()}"]
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
    """Process id of the raylet under a rollout worker that is alone on its node."""
    workers = [pid for pid in descendants(1) if command_of(pid).startswith("ray::RolloutWorker")]
    ranks = [pid for pid in descendants(1) if command_of(pid).startswith("ray::LearnerRank")]
    heads = {parent_of(pid) for pid in ranks}
    return min(raylet for raylet in map(parent_of, workers) if raylet not in heads)


def _wait_for_raylet(started: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if any("raylet/raylet" in command_of(pid) for pid in descendants(started.pid)):
            return
        if started.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(log.read_text())
