"""Reports a student whose probability leaves the support, which ``loss.form: raw`` rewards. Pure.

On a fixed support the raw form has its minimum at p = q / e, not at p = q: it gains by moving probability to ids that
it does not count.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 5
"""Steps at the start that set the reference, and newest steps that are compared with it."""
RATIO, MARGIN = 2.0, 0.01
"""The mass outside the support may double and grow by one percent before it is reported."""


class SupportAlarm:
    """Compares ``mass/student_topk`` of the newest steps with the first ones; reports once."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._newest: deque[float] = deque(maxlen=WINDOW)
        self._raised = False

    def observe(self, mass: float) -> str | None:
        """A line to report if the student's mass on the support has fallen, else None."""
        if not math.isfinite(mass):  # the step was skipped
            return None
        if len(self._first) < WINDOW:
            self._first.append(1 - mass)
            return None
        self._newest.append(1 - mass)
        before, now = statistics.median(self._first), statistics.median(self._newest)
        if self._raised or len(self._newest) < WINDOW or now <= RATIO * before + MARGIN:
            return None
        self._raised = True
        return (
            f"mass/student_topk fell from {1 - before:.3f} in the first {WINDOW} steps to {1 - now:.3f}: loss.form "
            "`raw` moves probability off the support; set loss.form to `tail` or `renorm`, or lower learner.lr"
        )
