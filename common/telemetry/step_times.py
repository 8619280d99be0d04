"""Where the time of a step went: how long no rank computed, which stage that was for, how much overlapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from common.telemetry.run_files import Span, covered_s
from common.telemetry.trace import TraceSpan

COMPUTE = ("topk", "accumulate", "step")
"""Stages in which a rank of the learner computes."""

QUEUE = "queue"
"""Nobody works on what lies in a queue: its time is no stage's work."""

DEPTHS = (QUEUE, "rollout", "score")
"""Where answers pile up: before a worker has room for them, in the engines, at the teacher."""

UPSTREAM_FIRST = ("rollout", "score", QUEUE, "sync", "parity")
"""Which of several stages at work an idle learner waits for: the earliest, since the later ones wait for it too."""

OTHER = "other"
"""Waited for while no stage was at work: the loop itself."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step, or of several added up (`+`).

    ``stage_s``: covered by a stage, overlapping spans once. ``span_s``: of all its spans, added up. ``wait_s``: part of
    the step in which no rank computed, by the stage that was waited for; it sums to ``trainer_idle_s``.
    """

    total_s: float = 0.0
    trainer_idle_s: float = 0.0
    stage_s: Mapping[str, float] = field(default_factory=dict)
    span_s: Mapping[str, float] = field(default_factory=dict)
    wait_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def trainer_idle_ratio(self) -> float:
        """Share of the step in which no rank computed."""
        return self._share(self.trainer_idle_s)

    @property
    def wait_shares(self) -> dict[str, float]:
        """Shares of the step in which the learner waited, by stage."""
        return {stage: self._share(seconds) for stage, seconds in self.wait_s.items()}

    @property
    def overlap_ratio(self) -> float:
        """Stages' working times over the step's: 1 where they took turns, their number where all overlapped."""
        return self._share(sum(seconds for stage, seconds in self.stage_s.items() if stage != QUEUE))

    @property
    def depths(self) -> dict[str, float]:
        """Answers that were at each of `DEPTHS` at a time, in the mean over the step."""
        return {stage: self._share(self.span_s.get(stage, 0.0)) for stage in DEPTHS}

    def metrics(self) -> dict[str, float]:
        """``time/trainer_idle_ratio``, ``time/overlap_ratio`` and ``time/wait_ratio/STAGE``, all shares of the step, and
        ``queue_depth/STAGE`` in answers.
        """
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


def step_times(spans: Iterable[TraceSpan], window: Span) -> StepTimes:
    """Times of the step that went from ``window[0]`` to ``window[1]``.

    `spans` are the work on this step's own samples: where rollouts run ahead, those of later steps are not waited for.
    What lies outside the window is cut off.
    """
    by_stage: dict[str, list[Span]] = {}
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
    """Several steps as one; its ratios are means weighted by the steps' lengths."""
    return reduce(StepTimes.__add__, steps, StepTimes())


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same moments as disjoint intervals in order; empty ones are left out."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return found


def intersection(first: Iterable[Span], second: Iterable[Span]) -> list[Span]:
    """Moments that lie in both, disjoint and in order."""
    left, right = merged(first), merged(second)
    found: list[Span] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            found.append((start, end))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(first: Iterable[Span], second: Iterable[Span]) -> list[Span]:
    """Moments of `first` that do not lie in `second`, disjoint and in order."""
    taken = merged(second)
    borders: Sequence[float] = [float("-inf"), *(t for span in taken for t in span), float("inf")]
    gaps = list(zip(borders[::2], borders[1::2], strict=True))
    return intersection(first, gaps)


def _wait_order(stages: Iterable[str]) -> list[str]:
    """Stages that can be waited for, the known ones in their order, others behind them as they came."""
    waiting = [stage for stage in stages if stage not in COMPUTE]
    known = [stage for stage in UPSTREAM_FIRST if stage in waiting]
    return [*known, *(stage for stage in waiting if stage not in UPSTREAM_FIRST)]


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
