"""Accuracy on held-out rows and its change, each with a 95% interval.

Rows are the random sample of the task, so every interval counts rows. Several answers to one row make the row's share
of right answers more precise; they do not count as more rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers on `n` rows with `samples` answers each (pass@1: the mean over rows of a row's share)."""

    accuracy: float
    n: int
    ci95: Interval
    samples: int = 1
    rows: Mapping[str, float] = field(default_factory=dict)
    """Maps a row's id to its share of right answers."""

    def summary(self) -> dict[str, Any]:
        """Return all fields except `rows`, as JSON values."""
        return {"accuracy": self.accuracy, "n": self.n, "ci95": list(self.ci95), "samples": self.samples}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Accuracy:
        """Rebuild from ``dataclasses.asdict``, also after JSON turned tuples into lists."""
        return cls(**{**state, "ci95": (state["ci95"][0], state["ci95"][1])})


@dataclass(frozen=True, slots=True)
class Change:
    """Change of a figure on the same rows: after minus before."""

    change: float
    ci95: Interval

    @property
    def covers_zero(self) -> bool:
        """True if the change may be zero."""
        return self.ci95[0] <= 0 <= self.ci95[1]


def pass_at_1(verdicts: Mapping[str, Sequence[bool]]) -> Accuracy:
    """Compute the accuracy from each row's verdicts: the same number of answers for every row, at least one.

    The interval is Wilson's at `effective_n` independent answers. With one answer per row that is the number of rows;
    Wilson's interval is accurate also at 0 and 1. Raises ValueError for rows with different numbers of answers.
    """
    counts = {len(row) for row in verdicts.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"rows have {sorted(counts)} answers each; all rows need the same number, at least one")
    (samples,) = counts
    rows = {name: sum(row) / samples for name, row in verdicts.items()}
    mean = sum(rows.values()) / len(rows)
    spread = sum((value - mean) ** 2 for value in rows.values()) / len(rows)
    n = effective_n(mean, spread / len(rows), max_n=len(rows) * samples, if_constant=len(rows))
    return Accuracy(accuracy=mean, n=len(rows), ci95=wilson(mean, n), samples=samples, rows=rows)


def effective_n(p: float, variance: float, *, max_n: float, if_constant: float) -> float:
    """Return the number of independent answers, share `p` right, whose mean has `variance` (Kish's effective sample
    size), between 1 and `max_n`. If all answers are right, or all wrong, the variance carries no information and the
    result is `if_constant`.
    """
    if p in (0.0, 1.0):
        return if_constant
    return min(max(p * (1 - p) / variance, 1), max_n) if variance > 0 else max_n


def wilson(p: float, n: float) -> Interval:
    """Return Wilson's 95% score interval of a share `p` of `n`."""
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def change(before: Accuracy, after: Accuracy) -> Change:
    """Compute after minus before, paired by row, so that unchanged rows do not widen the interval.

    The interval is Bonett and Price's (2012): two more rows, one gained and one lost, keep it accurate if few rows or
    none changed. Raises ValueError if the rows are not the same.
    """
    (first, second), n = align_rows(before.rows, after.rows), before.n
    differences = second - first
    centre = float(differences.sum()) / (n + 2)
    variance = (float((differences**2).sum()) + 2) / (n + 2) - centre**2
    half = Z95 * math.sqrt(variance / (n + 2))
    return Change(after.accuracy - before.accuracy, (max(-1.0, centre - half), min(1.0, centre + half)))


def align_rows(*results: Mapping[str, float]) -> NDArray[np.float64]:
    """Stack the shares by row of several results, in one order of rows: ``[results, rows]``.

    Raises ValueError if the rows are not the same.
    """
    names = list(results[0])
    for rows in results[1:]:
        if rows.keys() != results[0].keys():
            different = sorted(set(names) ^ set(rows))
            raise ValueError(f"results of different rows cannot be compared: {', '.join(different[:5])}")
    return np.array([[rows[name] for name in names] for rows in results], dtype=np.float64)
