"""Reports jumps of the divergence, often the first sign of a run that goes wrong. Pure."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 20
MIN_STEPS = 3
"""Steps before the median is used."""


class KlAlarm:
    """Compares each step's divergence with the median of the `WINDOW` steps before it."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._before: deque[float] = deque(maxlen=WINDOW)
        self.raised = 0
        """Steps that were reported."""

    def observe(self, value: float) -> str | None:
        """A line to report if `value` (nats a token) is more than `ratio` times the median, or NaN; else None."""
        usual = statistics.median(self._before) if len(self._before) >= MIN_STEPS else math.inf
        if math.isfinite(value):
            self._before.append(value)
            if value <= self._ratio * usual:
                return None
        self.raised += 1
        return (
            f"the divergence is {value:.3g} nats a token, the median of the {len(self._before)} steps before is "
            f"{usual:.3g} (learner.kl_alarm_ratio {self._ratio:g}): look at the samples, lower learner.lr, or set "
            "loss.clip_per_token"
        )
