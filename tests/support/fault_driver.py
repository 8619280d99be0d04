"""A run in which one process is killed at one moment: ``python -m tests.support.fault_driver VICTIM PHASE CONFIG``.

It is ``python -m learner.train`` with one change: a call of the loop, in the second step, sends SIGKILL to the victim a
moment after it was made. Nothing of the run knows of it. ``disk checkpoint CONFIG``: nobody is killed, but the files
that the learner writes for the second checkpoint may not grow beyond `FULL_BYTES`. ``extra worker CONFIG``: the first
step does not end before an extra worker is up, and in the second one Ray is told to drain its node.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from typing import Any

from learner.cluster.services import Services
from tests.support.processes import command_of, descendants
from tests.support.ray_nodes import drain, raylet_of_a_remote_worker

VICTIMS = {
    "worker": "ray::RolloutWorker",
    "engine": "VLLM::EngineCore",
    "teacher": "ray::TeacherActor",
    "rank": "ray::LearnerRank",
    "driver": "",
    "node": "",
}
"""What a process is called that runs it; the driver is this process, and of a node its raylet dies."""

PHASES = {
    "rollout": ("rollout_scored", 0.02),
    "scoring": ("rollout_scored", 0.6),
    "accumulation": ("accumulate", 0.02),
    "step": ("finish_step", 0.02),
    "sync": ("publish", 0.02),
    "checkpoint": ("save_state", 0.02),
}
"""The call of `Services` that the phase begins with, and how long after it the victim dies. (The tests' teacher waits
half a second for more requests before it scores: at 0.6 s answers are there and scores are not.)"""

FULL_BYTES = 64 * 1024
"""Less than a state has, more than a log."""
STEP = 1
"""The step (from 0) in which it happens."""


def victims(name: str) -> list[int]:
    """Process ids of all victims of a kind."""
    if name == "driver":
        return [os.getpid()]
    if name == "node":
        return [raylet_of_a_remote_worker()]
    command = VICTIMS[name.removeprefix("last ")]
    return [pid for pid in descendants(os.getpid()) if command_of(pid).startswith(command)]


def kill_one(name: str) -> None:
    """SIGKILL to the victim with the lowest process id; to that with the highest for a name like ``last rank``."""
    pid = (max if name.startswith("last ") else min)(victims(name))
    print(f"killed {name} {pid}", flush=True)
    os.kill(pid, signal.SIGKILL)


def arm(victim: str, phase: str) -> None:
    """Make the call that begins `phase` of step `STEP` the victim's last."""
    method, delay_s = PHASES[phase]
    original = getattr(Services, method)
    calls_of: dict[str, int] = {"finish_step": 0, method: 0}
    fired = threading.Event()

    def due() -> bool:
        """The steps before are over: `finish_step` ends one."""
        return calls_of["finish_step"] == STEP + (method in ("publish", "save_state"))

    def wrapped(self: Services, *arguments: Any) -> Any:
        if due() and not fired.is_set():
            fired.set()
            threading.Timer(delay_s, kill_one, [victim]).start()
        if method == "finish_step":
            calls_of["finish_step"] += 1
        return original(self, *arguments)

    setattr(Services, method, wrapped)
    if method != "finish_step":
        finish = Services.finish_step

        async def counted(self: Services, tokens: int, sequences: int) -> Any:
            calls_of["finish_step"] += 1
            return await finish(self, tokens, sequences)

        Services.finish_step = counted


def fill_the_disk() -> None:
    """While the second checkpoint is written."""
    original = Services.save_state
    folders: list[str] = []

    async def limited(self: Services, folder: str) -> None:
        folders.append(folder)
        if len(folders) != STEP + 1:
            return await original(self, folder)
        rank = min(victims("rank"))
        before = resource.prlimit(rank, resource.RLIMIT_FSIZE)
        resource.prlimit(rank, resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
        try:
            await original(self, folder)
        finally:
            resource.prlimit(rank, resource.RLIMIT_FSIZE, before)

    Services.save_state = limited


def come_and_go() -> None:
    """An extra worker has joined when the second step begins, and leaves at its end."""
    original = Services.finish_step
    steps = 0

    async def finish_step(self: Services, tokens: int, sequences: int) -> Any:
        nonlocal steps
        if steps == STEP - 1:
            await self.pool.next_ready()
        if steps == STEP:
            for node in self.pool.nodes.values():
                drain(node)
        steps += 1
        return await original(self, tokens, sequences)

    Services.finish_step = finish_step


if __name__ == "__main__":
    from learner.train import main

    if sys.argv[1] == "disk":
        fill_the_disk()
    elif sys.argv[1] == "extra":
        come_and_go()
    else:
        arm(sys.argv[1], sys.argv[2])
    sys.exit(main(sys.argv[3:]))
