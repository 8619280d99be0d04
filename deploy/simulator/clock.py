"""Time in a simulation: events, stages that share cores with others, workers whose answers slow each other down."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class StageClock:
    """Event queue of one kind of stage. `now` counts seconds of undisturbed work.

    The caller's `slowness` is the number of real seconds that one such second takes.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, order: int, happen: Callable[[], None]) -> None:
        """Schedule `happen` for `when`; the lowest `order` comes first among events of the same time."""
        heapq.heappush(self._due, (when, order, happen))

    def next(self, slowness: float) -> tuple[float, int]:
        """(real seconds until the next event at this slowness, its order)."""
        if not self._due:
            return math.inf, 0
        when, order, _ = self._due[0]
        return max(0.0, when - self.now) * slowness, order

    def advance(self, seconds: float, slowness: float) -> None:
        """Let real `seconds` pass."""
        self.now += seconds / slowness

    def pop(self) -> Callable[[], None]:
        """Remove and return the next event."""
        when, _, happen = heapq.heappop(self._due)
        self.now = max(self.now, when)  # rounding must not leave a remainder
        return happen


class Schedule:
    """Events in order of time. Work on a stage slows down by `interference` for each other active stage."""

    def __init__(self, stages: Sequence[str], interference: float) -> None:
        self.now = 0.0
        self.clocks = {name: StageClock() for name in stages}
        self.active = dict.fromkeys(stages, 0)
        """Number of answers in flight, of busy replicas and of busy ranks."""
        self.paused: set[str] = set()
        """Stages that are at a standstill, whatever is in flight."""
        self._interference = interference
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, happen: Callable[[], None]) -> None:
        """Call `happen` at a time that no stage delays."""
        self._count += 1
        heapq.heappush(self._events, (when, self._count, happen))

    def at_work(self, stage: str, when: float, happen: Callable[[], None]) -> None:
        """Call `happen` when the clock of `stage` reaches `when`."""
        self._count += 1
        self.clocks[stage].at(when, self._count, happen)

    def next(self) -> None:
        """Advance to the next event and execute it."""
        slowness = self._slowness()
        first = min(self.clocks, key=lambda name: self.clocks[name].next(slowness[name]))
        seconds, order = self.clocks[first].next(slowness[first])
        when, event_order = self._events[0][:2] if self._events else (math.inf, 0)
        if (seconds, order) < (when - self.now, event_order):
            self._advance(self.now + seconds, slowness)
            self.clocks[first].pop()()
        else:
            self._advance(when, slowness)
            heapq.heappop(self._events)[2]()

    def _slowness(self) -> dict[str, float]:
        """Real seconds per second of undisturbed work, by stage."""
        busy = {name: count > 0 and name not in self.paused for name, count in self.active.items()}
        return {name: 1 + self._interference * (sum(busy.values()) - busy[name]) for name in busy}

    def _advance(self, when: float, slowness: Mapping[str, float]) -> None:
        for name, clock in self.clocks.items():
            clock.advance(when - self.now, slowness[name])
        self.now = when


class WorkerClock(Generic[T]):
    """Answers in flight on one worker; n of them run at ``1 / (1 + contention · (n - 1))`` of the speed of one alone.

    Times are those of the rollouts' `StageClock`.
    """

    def __init__(self, contention: float) -> None:
        self._contention = contention
        self._done_at: list[tuple[float, int, T]] = []
        self._worked = 0.0
        """Progress, in seconds alone, of an answer in flight all the time."""
        self._now = 0.0
        self._stopped = False
        self._order = 0

    def add(self, now: float, alone_s: float, sample: T) -> None:
        """Start `sample`, which takes `alone_s` on an idle worker."""
        self._advance(now)
        self._order += 1
        heapq.heappush(self._done_at, (self._worked + alone_s, self._order, sample))

    def stop(self, now: float) -> None:
        """Pause all answers."""
        self._advance(now)
        self._stopped = True

    def resume(self, now: float) -> None:
        """Resume all answers."""
        self._advance(now)
        self._stopped = False

    def next_end(self) -> float:
        """Time at which the next answer ends if no other event comes first."""
        if self._stopped or not self._done_at:
            return math.inf
        return self._now + max(0.0, self._done_at[0][0] - self._worked) * self._slowness()

    def pop(self, now: float) -> T:
        """Remove and return the answer that ends now."""
        self._advance(now)
        worked, _, sample = heapq.heappop(self._done_at)
        self._worked = worked  # rounding must not leave a remainder
        return sample

    def _advance(self, now: float) -> None:
        if self._done_at and not self._stopped:
            self._worked += (now - self._now) / self._slowness()
        self._now = now

    def _slowness(self) -> float:
        return 1 + self._contention * (len(self._done_at) - 1)
