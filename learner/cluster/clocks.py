"""Clocks of a cluster's nodes against this one. Spans of other nodes carry their clock's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

READINGS = 5
TOLERATED_S = 0.1
"""Difference without a warning; stages of a step take seconds."""
TIMEOUT_S = 60.0
"""Limit for a node's answer, the start of a process included. A node that does not answer is left out."""


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """Seconds by which another clock is ahead, and the largest error of that figure."""

    seconds: float
    error_s: float


class Clock:
    """Actor that reads its node's clock."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()


def offset_of(readings: Sequence[tuple[float, float, float]]) -> ClockOffset:
    """The offset from the fastest of `readings`: (time asked, the other clock's time, time answered)."""
    asked, other, answered = min(readings, key=lambda reading: reading[2] - reading[0])
    return ClockOffset(other - (asked + answered) / 2, (answered - asked) / 2)


def clock_warning(offsets: Mapping[str, ClockOffset]) -> str | None:
    """A line about the clock, of those by node address, that is off most; None if all are close."""
    if not offsets:
        return None
    node, worst = max(offsets.items(), key=lambda one: abs(one[1].seconds))
    if abs(worst.seconds) - worst.error_s <= TOLERATED_S:
        return None
    side = "ahead of" if worst.seconds > 0 else "behind"
    return (
        f"the clock of node {node} is {abs(worst.seconds):.2f} s {side} this one (± {worst.error_s:.2f}): seconds by "
        "stage, trace.json and opcd simulate are off by as much, the training is not; synchronise the clocks (NTP)"
    )


async def measure_clocks(nodes: Mapping[str, str]) -> dict[str, ClockOffset]:
    """Offsets by address of `nodes`, which maps ids of Ray to addresses."""
    found = await asyncio.gather(*map(_measure, nodes))
    return {nodes[node]: offset for node, offset in zip(nodes, found, strict=True) if offset is not None}


def other_nodes() -> dict[str, str]:
    """Id -> address of the living nodes without the driver's."""
    own = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    return {node: address for node, address in alive.items() if node != own}


async def _measure(node: str) -> ClockOffset | None:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    actor: Any = ray.remote(num_cpus=0, scheduling_strategy=strategy)(Clock).remote()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await actor.now.remote()  # the process starts
            readings = []
            for _ in range(READINGS):
                asked = time.time()
                other = await actor.now.remote()
                readings.append((asked, other, time.time()))
            return offset_of(readings)
    except (TimeoutError, ray.exceptions.RayError):
        return None
    finally:
        ray.kill(actor)
