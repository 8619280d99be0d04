"""Figures of several runs that differ in their seed alone, on the same rows: means, and intervals that know of both.

Rows and seeds are crossed: every run answers every row. So two variances add up, that of the mean over rows and that of
the mean over seeds (each holds a part of the answers' own chance: together a little too much, never too little). The
latter is estimated from as many values as there are seeds: of three it is rough, of one it is not known and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.evaluation.accuracy import (
    RESAMPLES,
    Z95,
    Accuracy,
    Change,
    Interval,
    aligned,
    change,
    effective_n,
    ratio_interval,
    wilson,
)

Rows = Mapping[str, float]
"""Row id -> its share of right answers in one run."""


def accuracy_over_seeds(runs: Sequence[Rows]) -> Accuracy:
    """Mean over runs and rows; Wilson's interval at the independent answers that they are worth. At least one run.

    Raises ValueError where the runs have different rows.
    """
    scores = _matrix(runs)
    seeds, rows = scores.shape
    mean = float(scores.mean())
    variance = float(scores.mean(axis=0).var()) / rows + _seed_variance(scores)
    n = effective_n(mean, variance, at_least=1, at_most=rows * seeds, flat=rows)
    return Accuracy(mean, rows, wilson(mean, n), seeds, dict(zip(runs[0], scores.mean(axis=0).tolist(), strict=True)))


def change_over_seeds(before: Sequence[Rows], after: Sequence[Rows]) -> Change:
    """Mean of after minus before, paired by row and by run; the interval of `accuracy.change`, widened by
    what the runs differ in. Raises ValueError where rows or numbers of runs are not the same.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} runs cannot be paired")
    first, second = accuracy_over_seeds(before), accuracy_over_seeds(after)
    found = change(first, second)
    between = Z95**2 * _seed_variance(_matrix([*after], like=before[0]) - _matrix(before))
    low, high = (
        end + sign * (math.hypot(half, math.sqrt(between)) - half)
        for half in [(found.ci95[1] - found.ci95[0]) / 2]
        for end, sign in zip(found.ci95, (-1, 1), strict=True)
    )
    return Change(found.change, (max(-1.0, low), min(1.0, high)))


def gap_closed_over_seeds(
    base: Sequence[Rows], in_context: Sequence[Rows], final: Sequence[Rows], seed: int = 0
) -> tuple[float | None, Interval | None]:
    """(mean gain over mean gap, its interval): a bootstrap that draws rows and runs anew, always the same for a `seed`.

    No value where there is no gap; no interval where the gap's own covers zero.
    """
    stacked = np.stack([_matrix(runs, like=base[0]) for runs in (base, in_context, final)], axis=-1)
    gain, gap = (stacked[..., i] - stacked[..., 0] for i in (2, 1))
    value = float(gain.mean() / gap.mean()) if gap.mean() else None
    if value is None or change_over_seeds(base, in_context).covers_zero:
        return value, None
    runs, rows, _ = stacked.shape
    rng, means = np.random.default_rng(seed), np.empty((RESAMPLES, 3))
    for index in range(RESAMPLES):
        weights = rng.multinomial(rows, np.full(rows, 1 / rows)) / rows
        means[index] = weights @ stacked[rng.integers(runs, size=runs)].mean(axis=0)
    return value, ratio_interval(means[:, 2] - means[:, 0], means[:, 1] - means[:, 0])


def _matrix(runs: Sequence[Rows], like: Rows | None = None) -> NDArray[np.float64]:
    """``[runs, rows]``, columns in the order of `like`."""
    known = [_bare(like if like is not None else runs[0]), *map(_bare, runs)]
    return np.stack(aligned(*known)[1:])


def _bare(rows: Rows) -> Accuracy:
    return Accuracy(math.nan, len(rows), (math.nan, math.nan), rows=rows)


def _seed_variance(scores: NDArray[np.float64]) -> float:
    """Variance of the mean over runs, by what the runs' own means differ in."""
    runs = len(scores)
    return float(scores.mean(axis=1).var(ddof=1)) / runs if runs > 1 else 0.0
