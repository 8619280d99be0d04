"""Accuracy on held-out rows, what changed, the gap closed, each with its interval. Pure: answers come from elsewhere.

A row is what was drawn at random from the task, so rows are what every interval counts: several answers to one row make
that row's own share of right answers sharper, they are not more rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.graders import Grader

Z95 = 1.959964
RESAMPLES = 2000
"""Of a bootstrap: the ends of its interval are then good to about a tenth of its width."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers (pass@1: the mean over rows of a row's share) on `n` rows, `samples` answers each."""

    accuracy: float
    n: int
    ci95: Interval
    samples: int = 1
    rows: Mapping[str, float] = field(default_factory=dict)
    """Row id -> its share of right answers."""

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, as JSON values."""
        return {"accuracy": self.accuracy, "n": self.n, "ci95": list(self.ci95), "samples": self.samples}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Accuracy:
        """From what ``dataclasses.asdict`` made of one, lists for tuples."""
        return cls(**{**state, "ci95": (state["ci95"][0], state["ci95"][1])})


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a figure: after minus before, on the same rows."""

    change: float
    ci95: Interval

    @property
    def covers_zero(self) -> bool:
        """Whether there may have been none."""
        return self.ci95[0] <= 0 <= self.ci95[1]


def grade(answers: Sequence[str], expected: Sequence[str], grader: Grader) -> list[bool]:
    """One verdict per row; raises ValueError where an answer is missing."""
    return [grader(answer, right) for answer, right in zip(answers, expected, strict=True)]


def accuracy(right: Sequence[bool]) -> Accuracy:
    """Accuracy of graded answers, one a row; at least one is needed."""
    return pass_at_1({str(row): [verdict] for row, verdict in enumerate(right)})


def pass_at_1(verdicts: Mapping[str, Sequence[bool]]) -> Accuracy:
    """Accuracy of several graded answers to each row, all rows the same number of them; at least one is needed.

    The interval is Wilson's at the number of independent answers that the rows are worth (`effective_n`): with one
    answer a row that is the number of rows, and the interval Wilson's own, which stays honest at 0 and at 1.
    Raises ValueError for rows with different numbers of answers.
    """
    counts = {len(row) for row in verdicts.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"rows have {sorted(counts)} answers each; all need the same number, at least one")
    (samples,) = counts
    rows = {name: sum(row) / samples for name, row in verdicts.items()}
    mean = sum(rows.values()) / len(rows)
    spread = sum((value - mean) ** 2 for value in rows.values()) / len(rows)
    ci95 = wilson(mean, effective_n(mean, spread / len(rows), at_least=1, at_most=len(rows) * samples, flat=len(rows)))
    return Accuracy(accuracy=mean, n=len(rows), ci95=ci95, samples=samples, rows=rows)


def effective_n(p: float, variance: float, *, at_least: float, at_most: float, flat: float) -> float:
    """Independent answers with share `p` right whose mean would have `variance` (Kish's effective sample size).

    `flat` where nothing varies because all are right, or all wrong: the variance says nothing there.
    """
    if p in (0.0, 1.0):
        return flat
    return min(max(p * (1 - p) / variance, at_least), at_most) if variance > 0 else at_most


def wilson(p: float, n: float) -> Interval:
    """Wilson's 95% score interval of a share `p` among `n`."""
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def change(before: Accuracy, after: Accuracy) -> Change:
    """After minus before, paired by row: what both got right, or wrong, does not blur it.

    The interval is Bonett and Price's (2012): two more rows, one won and one lost, keep it honest where few rows
    changed or none did. Raises ValueError where the rows are not the same.
    """
    (first, second), n = aligned(before, after), before.n
    differences = second - first
    centre = float(differences.sum()) / (n + 2)
    variance = (float((differences**2).sum()) + 2) / (n + 2) - centre**2
    half = Z95 * math.sqrt(variance / (n + 2))
    return Change(after.accuracy - before.accuracy, (max(-1.0, centre - half), min(1.0, centre + half)))


def gap_closed(base: Accuracy, in_context: Accuracy, final: Accuracy) -> float | None:
    """(after - before) / (in context - before); None where the context makes no difference: nothing to distil."""
    gap = in_context.accuracy - base.accuracy
    return None if gap == 0 else (final.accuracy - base.accuracy) / gap


def gap_closed_ci95(base: Accuracy, in_context: Accuracy, final: Accuracy, seed: int = 0) -> Interval | None:
    """95% interval of `gap_closed`: percentiles of a paired bootstrap over rows, always the same for one `seed`.

    None where the gap itself may be zero (its interval covers zero): a ratio to it says nothing then. Resamples without
    a gap in the direction of the whole (under 2.5% of them, or the gap's interval would cover zero) are left out.
    """
    if change(base, in_context).covers_zero:
        return None
    scores = np.stack(aligned(base, in_context, final), axis=-1)
    means = resampled(scores, np.random.default_rng(seed))
    return ratio_interval(means[:, 2] - means[:, 0], means[:, 1] - means[:, 0])


def ratio_interval(gains: NDArray[np.float64], gaps: NDArray[np.float64]) -> Interval:
    """2.5% and 97.5% percentile of gain over gap, where the gap has the sign of most."""
    usable = gaps * np.sign(np.median(gaps)) > 0
    low, high = np.quantile(gains[usable] / gaps[usable], (0.025, 0.975))
    return float(low), float(high)


def resampled(scores: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `RESAMPLES` resamples of the rows of ``scores [rows, m]``: ``[RESAMPLES, m]``."""
    rows = len(scores)
    even = np.full(rows, 1 / rows)
    return np.stack([rng.multinomial(rows, even) @ scores / rows for _ in range(RESAMPLES)])


def aligned(*results: Accuracy) -> tuple[NDArray[np.float64], ...]:
    """The rows' shares of each result, ``[n]``, in one order. Raises ValueError where the rows are not the same."""
    names = list(results[0].rows)
    for result in results[1:]:
        if result.rows.keys() != results[0].rows.keys():
            different = sorted(set(names) ^ set(result.rows))
            raise ValueError(f"results of different rows cannot be compared: {', '.join(different[:5])}")
    return tuple(np.array([result.rows[name] for name in names], dtype=np.float64) for result in results)
