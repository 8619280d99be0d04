"""Time in a simulation: of a stage whose cores others may share, and of a worker whose answers slow each other down."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class StageClock:
    """Seconds of work that one kind of stage has behind it, had it been at work all the time, and what is due when.

    It is slow by the caller's `slowness`, seconds a second of work.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def at(self, when: float, order: int, happen: Callable[[], None]) -> None:
        """Have `happen` called when the clock is at `when`; of several at once the lowest `order` first."""
        heapq.heappush(self._due, (when, order, happen))

    def next(self, slowness: float) -> tuple[float, int]:
        """(seconds until something is due if nothing changes, its order)."""
        if not self._due:
            return math.inf, 0
        when, order, _ = self._due[0]
        return max(0.0, when - self.now) * slowness, order

    def go_on(self, seconds: float, slowness: float) -> None:
        """So much time passes."""
        self.now += seconds / slowness

    def pop(self) -> Callable[[], None]:
        """What is due, taken out."""
        when, _, happen = heapq.heappop(self._due)
        self.now = max(self.now, when)  # rounding must not leave a rest
        return happen


class WorkerClock(Generic[T]):
    """Answers in flight, each ahead by the same share of its own speed: ``1 / (1 + contention · (n - 1))`` of n.

    Times are those of the rollouts' `StageClock`.
    """

    def __init__(self, contention: float) -> None:
        self._contention = contention
        self._done_at: list[tuple[float, int, T]] = []
        self._worked = 0.0
        """Seconds of its own that an answer in flight all the time would have behind it."""
        self._now = 0.0
        self._stopped = False
        self._order = 0

    def add(self, now: float, alone_s: float, sample: T) -> None:
        """`sample` begins; by itself it would take `alone_s`."""
        self._go_on(now)
        self._order += 1
        heapq.heappush(self._done_at, (self._worked + alone_s, self._order, sample))

    def stop(self, now: float) -> None:
        """All stand still."""
        self._go_on(now)
        self._stopped = True

    def resume(self, now: float) -> None:
        """All go on."""
        self._go_on(now)
        self._stopped = False

    def next_end(self) -> float:
        """When the next answer ends if nothing changes."""
        if self._stopped or not self._done_at:
            return math.inf
        return self._now + max(0.0, self._done_at[0][0] - self._worked) * self._slowness()

    def pop(self, now: float) -> T:
        """The answer that ends now."""
        self._go_on(now)
        worked, _, sample = heapq.heappop(self._done_at)
        self._worked = worked  # rounding must not leave a rest
        return sample

    def _go_on(self, now: float) -> None:
        if self._done_at and not self._stopped:
            self._worked += (now - self._now) / self._slowness()
        self._now = now

    def _slowness(self) -> float:
        return 1 + self._contention * (len(self._done_at) - 1)
