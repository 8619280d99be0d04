"""Accuracy figures over several runs that differ only in their seed, with intervals over rows and seeds.

Every run answers every row, so two variances add up: that of the mean over rows and that of the mean over seeds. Both
contain a part of the sampling noise of the answers, so their sum is slightly too large, never too small. The variance
over seeds comes from one value per seed: with three seeds it is rough, with one seed it is unknown and left out.
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
    align_rows,
    change,
    effective_n,
    ratio_interval,
    wilson,
)

Rows = Mapping[str, float]
"""Maps a row's id to its share of right answers in one run."""


def accuracy_over_seeds(runs: Sequence[Rows]) -> Accuracy:
    """Compute the mean over one or more runs and their rows, with Wilson's interval at the effective sample size.

    Raises ValueError if the runs have different rows.
    """
    scores = align_rows(*runs)
    seeds, rows = scores.shape
    mean = float(scores.mean())
    variance = float(scores.mean(axis=0).var()) / rows + _seed_variance(scores)
    n = effective_n(mean, variance, max_n=rows * seeds, if_constant=rows)
    return Accuracy(mean, rows, wilson(mean, n), seeds, dict(zip(runs[0], scores.mean(axis=0).tolist(), strict=True)))


def change_over_seeds(before: Sequence[Rows], after: Sequence[Rows]) -> Change:
    """Compute the mean of after minus before, paired by row and run. The interval is that of `accuracy.change`, widened
    by the variance over runs. Raises ValueError if rows or numbers of runs are not the same.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} runs cannot be paired")
    first, second = accuracy_over_seeds(before), accuracy_over_seeds(after)
    over_rows = change(first, second)
    scores = align_rows(*before, *after)
    over_seeds = Z95 * math.sqrt(_seed_variance(scores[len(before) :] - scores[: len(before)]))
    low, high = over_rows.ci95
    half = (high - low) / 2
    wider = math.hypot(half, over_seeds) - half
    return Change(over_rows.change, (max(-1.0, low - wider), min(1.0, high + wider)))


def gap_closed_over_seeds(
    base: Sequence[Rows], in_context: Sequence[Rows], final: Sequence[Rows], seed: int = 0
) -> tuple[float | None, Interval | None]:
    """Return (mean gain over mean gap, its interval from a bootstrap over rows and runs), a function of `seed`.

    The value is None without a gap; the interval is None if the gap's own interval covers zero.
    """
    stacked = np.stack(np.split(align_rows(*base, *in_context, *final), 3), axis=-1)
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


def _seed_variance(scores: NDArray[np.float64]) -> float:
    """Return the variance of the mean over runs, estimated from the runs' means; 0 for a single run."""
    runs = len(scores)
    return float(scores.mean(axis=1).var(ddof=1)) / runs if runs > 1 else 0.0
