"""Ray clusters on this machine: a head, and worker nodes with room for one rollout worker each.

The worker nodes claim to have a GPU, which is never used: rollout workers ask for it, so no two share a node. The
learner and the teacher may be placed on any node.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

from common.openmp import share_cores
from tests.support.namespaces import Namespace
from tests.support.processes import alive, command_of, descendants, free_port, parent_of, wait_until_gone

ONE_WORKER_A_NODE = "rollout.gpus_per_worker=1"
SAME_PRIORITY = {"RAY_worker_niceness": "0"}
"""Environment variable: Ray runs its workers at nice 15, where other tests would starve a whole run."""
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]


@contextmanager
def ray_cluster(
    worker_nodes: int = 0, gpus: tuple[int, int] = (0, 1), namespaces: Sequence[Namespace] = ()
) -> Iterator[dict[str, str]]:
    """Start a cluster; yields the environment variables of a driver that joins it, and ends all of its processes.

    `gpus` are those that the head and each worker node claim. With `namespaces` the head and the worker nodes run in
    these, one each, and the driver must run in the first.
    """
    gcs, scratch = free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {"RAY_AUTH_MODE": "disabled", **SAME_PRIORITY}
    share_cores(variables)
    address = f"{namespaces[0].address if namespaces else '127.0.0.1'}:{gcs}"
    head = ["--head", f"--port={gcs}", f"--temp-dir={scratch}", "--include-dashboard=false", f"--num-gpus={gpus[0]}"]
    other = [f"--address={address}", f"--num-gpus={gpus[1]}"]
    started: list[subprocess.Popen[bytes]] = []
    log = Path(scratch, "start.log")
    try:
        nodes = [head, *[other] * worker_nodes]
        for options, place in zip_longest(nodes, namespaces):  # one by one: nodes that start together fail at times
            command = [*START, *options, "--num-cpus=1", f"--dashboard-agent-listen-port={free_port()}"]
            if place is not None:
                command = [*place.prefix, *command, f"--node-ip-address={place.address}"]
            _start_node(command, variables, started, log)
        yield {**variables, "RAY_ADDRESS": address}
    finally:
        pids = {node.pid for node in started}.union(*(descendants(node.pid) for node in started))
        for node in reversed(started):
            node.terminate()
        wait_until_gone(pids, 10)
        for pid in alive(pids):
            os.kill(pid, signal.SIGKILL)
        for node in started:
            node.wait(10)
        shutil.rmtree(scratch, ignore_errors=True)


def raylet_of_a_remote_worker() -> int:
    """Process id of the raylet of a node with a rollout worker and without a rank of the learner."""
    workers = [pid for pid in descendants(1) if command_of(pid).startswith("ray::RolloutWorker")]
    ranks = [pid for pid in descendants(1) if command_of(pid).startswith("ray::LearnerRank")]
    of_learner = {parent_of(pid) for pid in ranks}
    return min(raylet for raylet in map(parent_of, workers) if raylet not in of_learner)


def drain(node: str) -> None:
    """Tell Ray that `node` goes away in an hour. Its actors keep running; Ray places no new ones there."""
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=3600"]
    address = f"--address={os.environ['RAY_ADDRESS']}"
    subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", address, f"--node-id={node}", *reason], check=True
    )


def _start_node(
    command: list[str], variables: dict[str, str], started: list[subprocess.Popen[bytes]], log: Path
) -> None:
    """Add a ``ray start`` to `started` once its node is known to the head.

    A node gives up a head that is silent for 30 s, as on a machine with ten busy processes a core: it then starts anew.
    """
    known = len(started) + 1
    for _ in range(3):
        with log.open("ab") as output:
            node = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
        started.append(node)
        while node.poll() is None:
            if log.read_text().count("Ray runtime started.") == known:
                return
            time.sleep(0.05)
        started.remove(node)
    raise AssertionError(log.read_text())
