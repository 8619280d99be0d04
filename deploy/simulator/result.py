"""Result of a simulation: step times, queues, use of machines."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.telemetry.intervals import Interval
from common.telemetry.step_times import QUEUE, StepTimes, total_times
from common.telemetry.trace import TraceSpan

STAGES = ("rollout", "teacher", "learner")
"""Kinds of stages in the order in which a sample passes them; each has a queue."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Number of waiting samples: mean over the run, and maximum."""

    mean: float
    max: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """A simulated run. `queues` (waiting samples) and `busy` (fraction of slots, replicas or ranks in use) are by
    `STAGES`; `spans` are the timeline from time 0, in the form of a real run's.
    """

    steps: tuple[StepTimes, ...]
    tokens: int
    evicted: int
    queues: dict[str, QueueDepth]
    busy: dict[str, float]
    spans: tuple[TraceSpan, ...] = field(repr=False)

    @property
    def total(self) -> StepTimes:
        """Times of all steps added up."""
        return total_times(self.steps)

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return self.total.total_s / len(self.steps)

    @property
    def slowest_stage_s(self) -> float:
        """Mean seconds of a step in which the busiest stage was at work: the lower bound of a step at full overlap."""
        working = [seconds for stage, seconds in self.total.stage_s.items() if stage != QUEUE]
        return max(working, default=0.0) / len(self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Trained response tokens per second."""
        return self.tokens / self.total.total_s if self.total.total_s else math.inf


def queue_depth(spans: Iterable[Interval], total_s: float) -> QueueDepth:
    """Mean and maximum number of open `spans` in ``[0, total_s]``; a span that ends makes room for the next."""
    inside = [(start, min(end, total_s)) for start, end in spans if start < min(end, total_s)]
    changes = sorted([(start, 1) for start, _ in inside] + [(end, -1) for _, end in inside])
    depth = max_depth = 0
    for _, change in changes:
        depth += change
        max_depth = max(max_depth, depth)
    return QueueDepth(mean=sum(end - start for start, end in inside) / total_s if total_s else 0.0, max=max_depth)
