"""Figures: a measured value, its target, the limit of what is possible, and the method."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

THREADS = 2
"""Threads of every process that computes, on any machine: figures of machines with more cores stay comparable."""


def _load() -> float:
    return os.getloadavg()[1]


@dataclass(frozen=True)
class Figure:
    """One measurement. With a bound it has a target; without, it is only reported.

    Raises ValueError for two bounds, and for a value that is no number: nothing can be said about it.
    """

    value: float
    unit: str
    how: str
    """Method: sizes, repeats, raw numbers."""
    at_most: float | None = None
    at_least: float | None = None
    limit: str | None = None
    """The best that arithmetic or hardware allows, and why, in a few words: "10.6 by FLOPs"."""
    load: float = field(default_factory=_load)
    """The machine's load average over five minutes when the figure was made. The benchmark's processes count."""

    def __post_init__(self) -> None:
        if self.at_most is not None and self.at_least is not None:
            raise ValueError("a figure has one bound, at_most or at_least")
        if not math.isfinite(self.value):
            raise ValueError(f"{self.value} is no value: {self.how}")

    @property
    def target(self) -> str | None:
        """The bound as text."""
        if self.at_most is not None:
            return f"at most {self.at_most:,g}"
        return None if self.at_least is None else f"at least {self.at_least:,g}"

    @property
    def times_target(self) -> float | None:
        """How many times worse than its target the value is: 1 on the target, below 1 if it is better."""
        if self.at_most is not None:
            return self.value / self.at_most
        if self.at_least is not None:
            return self.at_least / self.value if self.value > 0 else math.inf
        return None

    @property
    def ok(self) -> bool | None:
        """True if the target is met; None without a target."""
        return None if self.times_target is None else self.times_target <= 1

    @property
    def method(self) -> str:
        """`how`, with the conditions of the machine."""
        return f"{self.how}; {THREADS} threads, load average {self.load:.1f}"


Figures = dict[str, Figure]
"""Figures by name, ``BENCHMARK.what``."""
