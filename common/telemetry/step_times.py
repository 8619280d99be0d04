"""Time of a step by stage: idle time of the trainer, the stage it waited for, overlap of stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce

from common.telemetry.intervals import Interval, covered_s, difference, intersection
from common.telemetry.trace import TraceSpan

COMPUTE = ("topk", "accumulate", "step")
"""Stages of a learner rank's computation."""

QUEUE = "queue"
"""Waiting time of answers in queues; not the work of a stage."""

DEPTHS = (QUEUE, "rollout", "score")
"""Stages whose number of answers is reported: waiting for a free worker, in the engines, at the teacher."""

UPSTREAM_FIRST = ("rollout", "context", "score", QUEUE, "sync", "parity")
"""Order in which active stages explain an idle learner: the earliest first, since later stages wait for it too."""

OTHER = "other"
"""Idle time while no stage was active: the loop itself."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step, or of several steps added up (`+`).

    ``stage_s``: time covered by a stage, overlapping spans counted once. ``span_s``: total of its spans. ``wait_s``:
    time in which no rank computed, by the stage that the learner waited for; it sums to ``trainer_idle_s``.
    """

    total_s: float = 0.0
    trainer_idle_s: float = 0.0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    span_s: Mapping[str, float] = field(default_factory=dict)
    wait_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def trainer_idle_ratio(self) -> float:
        """Fraction of the step in which no rank computed."""
        return self._share(self.trainer_idle_s)

    @property
    def wait_shares(self) -> dict[str, float]:
        """Fraction of the step in which the learner waited, by stage."""
        return {stage: self._share(seconds) for stage, seconds in self.wait_s.items()}

    @property
    def overlap_ratio(self) -> float:
        """Sum of the stages' times over the step's: 1 if they took turns, their number if all overlapped."""
        return self._share(sum(seconds for stage, seconds in self.stage_s.items() if stage != QUEUE))

    @property
    def depths(self) -> dict[str, float]:
        """Mean number of answers at each stage of `DEPTHS` over the step."""
        return {stage: self._share(self.span_s.get(stage, 0.0)) for stage in DEPTHS}

    def metrics(self) -> dict[str, float]:
        """Metrics ``time/trainer_idle_ratio``, ``time/overlap_ratio``, ``time/wait_ratio/*`` and ``queue_depth/*``."""
        waits = {f"time/wait_ratio/{stage}": share for stage, share in self.wait_shares.items()}
        depths = {f"queue_depth/{stage}": depth for stage, depth in self.depths.items()}
        return {
            "time/trainer_idle_ratio": self.trainer_idle_ratio,
            "time/overlap_ratio": self.overlap_ratio,
            **waits,
            **depths,
        }

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(
            total_s=self.total_s + other.total_s,
            trainer_idle_s=self.trainer_idle_s + other.trainer_idle_s,
            stage_s=_added(self.stage_s, other.stage_s),
            span_s=_added(self.span_s, other.span_s),
            wait_s=_added(self.wait_s, other.wait_s),
        )

    def _share(self, seconds: float) -> float:
        return seconds / self.total_s if self.total_s else 0.0


def step_times(spans: Iterable[TraceSpan], window: Interval) -> StepTimes:
    """Times of the step between ``window[0]`` and ``window[1]``; spans are clipped to it.

    `spans` are the work on this step's samples: rollouts of later steps are not waited for.
    """
    by_stage: dict[str, list[Interval]] = {}
    span_s: dict[str, float] = {}
    for span in spans:
        inside = intersection([span.interval], [window])
        by_stage.setdefault(span.stage, []).extend(inside)
        span_s[span.stage] = span_s.get(span.stage, 0.0) + covered_s(inside)
    computing = [interval for stage in COMPUTE for interval in by_stage.get(stage, [])]
    idle = difference([window], computing)
    trainer_idle_s = covered_s(idle)
    wait_s: dict[str, float] = {}
    for stage in _wait_order(by_stage):
        wait_s[stage] = covered_s(intersection(idle, by_stage[stage]))
        idle = difference(idle, by_stage[stage])
    return StepTimes(
        total_s=max(0.0, window[1] - window[0]),
        trainer_idle_s=trainer_idle_s,
        stage_s={stage: covered_s(intervals) for stage, intervals in by_stage.items()},
        span_s=span_s,
        wait_s={**wait_s, OTHER: covered_s(idle)},
    )


def total_times(steps: Iterable[StepTimes]) -> StepTimes:
    """Sum of several steps; its ratios are means weighted by step length."""
    return reduce(StepTimes.__add__, steps, StepTimes())


def _wait_order(stages: Iterable[str]) -> list[str]:
    """Stages the learner can wait for: the known ones in their order, then the others."""
    waiting = [stage for stage in stages if stage not in COMPUTE]
    known = [stage for stage in UPSTREAM_FIRST if stage in waiting]
    return [*known, *(stage for stage in waiting if stage not in UPSTREAM_FIRST)]


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
