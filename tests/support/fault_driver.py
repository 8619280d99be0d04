"""``python -m learner.train`` with faults: ``python -m tests.support.fault_driver FAULTS CONFIG [key=value ...]``.

FAULTS is a comma-separated list of ``VICTIM:PHASE:STEP``: the call that begins PHASE of STEP (from 1) sends SIGKILL to
the victim a moment later. Two faults kill no process. ``disk:checkpoint:STEP`` limits the size of the files that the
learner writes for that checkpoint to `MAX_FILE_BYTES`. ``extra:worker:STEP`` ends the step before STEP only when an
extra worker is up, and makes Ray drain the extra worker's node in STEP.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
from dataclasses import dataclass
from typing import Any

from learner.cluster.services import Services
from tests.support.processes import command_of, descendants
from tests.support.ray_nodes import drain, raylet_of_a_remote_worker

VICTIMS = {
    "worker": r"ray::RolloutWorker",
    "engine": r"VLLM::EngineCore|.*\bmultiprocessing\.spawn\b",
    "teacher": r"ray::TeacherActor",
    "rank": r"ray::LearnerRank",
    "driver": "",
    "node": "",
}
"""Start of each victim's command line. The engine has that of a spawned process until vLLM sets it. The
driver is this process; a node dies with its raylet."""

PHASES = {
    "rollout": ("rollout", 0.02),
    "scoring": ("rollout", 0.6),
    "accumulation": ("accumulate", 0.02),
    "step": ("finish_step", 0.02),
    "sync": ("publish", 0.02),
    "checkpoint": ("save_state", 0.0),
}
"""Method of `Services` that begins the phase, and seconds from its call to the kill. With `SLOW_SCORING` there are
answers and no scores after 0.6 s."""
SLOW_SCORING = "teacher.batch_window_ms=500"

MAX_FILE_BYTES = 64 * 1024
"""Less than the learner's state, more than a log."""


@dataclass(frozen=True)
class Fault:
    """One fault of FAULTS."""

    victim: str
    phase: str
    step: int


class Faults:
    """Watches the calls of `Services` and starts each fault once, at its call."""

    def __init__(self, faults: list[Fault]) -> None:
        self._waiting = faults
        self._version = 0

    def watch(self) -> None:
        """Replace the methods of `Services` that begin a phase or take part in a fault."""
        for method in {method for method, _ in PHASES.values()}:
            setattr(Services, method, self._watched(method, getattr(Services, method)))

    def _watched(self, method: str, original: Any) -> Any:
        def call(services: Services, *arguments: Any, **options: Any) -> Any:
            if method == "publish":
                (self._version,) = arguments
            if method == "rollout" and "scored" not in arguments:  # of an evaluation
                return original(services, *arguments, **options)
            for fault in [fault for fault in self._waiting if self._due(fault, method)]:
                if fault.victim == "disk":
                    self._waiting.remove(fault)
                    return with_small_files(original(services, *arguments, **options))
                if fault.victim == "extra":
                    return self._come_and_go(fault, services, original(services, *arguments, **options))
                self._waiting.remove(fault)
                # In the loop, which on a busy machine may be late but not after the replies that end the phase.
                asyncio.get_running_loop().call_later(PHASES[fault.phase][1], kill_one, fault.victim)
            return original(services, *arguments, **options)

        return call

    def _due(self, fault: Fault, method: str) -> bool:
        if fault.victim == "extra":
            return method == "finish_step" and self._version in (fault.step - 2, fault.step - 1)
        published = method in ("publish", "save_state")
        return method == PHASES[fault.phase][0] and self._version == (fault.step if published else fault.step - 1)

    async def _come_and_go(self, fault: Fault, services: Services, finish_step: Any) -> Any:
        if self._version == fault.step - 2:
            await services.pool.next_ready()
        else:
            self._waiting.remove(fault)
            for node in services.pool.nodes.values():
                drain(node)
        return await finish_step


def victims(name: str) -> list[int]:
    """Process ids of all victims of a kind."""
    if name == "driver":
        return [os.getpid()]
    if name == "node":
        return [raylet_of_a_remote_worker()]
    command = VICTIMS[name.removeprefix("last ")]
    return [pid for pid in descendants(os.getpid()) if re.match(command, command_of(pid))]


def kill_one(name: str) -> None:
    """Send SIGKILL to the victim with the lowest process id, or with the highest for a name like ``last rank``.

    Without a victim at the moment, for example while it is replaced, wait for one.
    """
    found = victims(name)
    if not found:
        asyncio.get_running_loop().call_later(0.05, kill_one, name)
        return
    pid = (max if name.startswith("last ") else min)(found)
    print(f"killed {name} {pid}", flush=True)
    if name == "driver":
        print("processes of the driver:", *descendants(pid), flush=True)
    os.kill(pid, signal.SIGKILL)


async def with_small_files(save_state: Any) -> None:
    """Run `save_state` while no file of the learner may grow beyond `MAX_FILE_BYTES`."""
    rank = min(victims("rank"))
    before = resource.prlimit(rank, resource.RLIMIT_FSIZE)
    resource.prlimit(rank, resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, before[1]))
    try:
        await save_state
    finally:
        resource.prlimit(rank, resource.RLIMIT_FSIZE, before)


if __name__ == "__main__":
    from learner.train import main

    parsed = [fault.split(":") for fault in sys.argv[1].split(",")]
    Faults([Fault(victim, phase, int(step)) for victim, phase, step in parsed]).watch()
    sys.exit(main(sys.argv[2:]))
