"""Accuracy figures over one or more runs that differ only in their seed, with intervals over rows and seeds.

Every run answers every row, so two variances add up: that of the mean over rows and that of the mean over seeds. Both
contain a part of the sampling noise of the answers, so their sum is slightly too large, never too small. The variance
over seeds comes from one value per seed, so it counts by Student's t quantile for that many seeds instead of the
normal one. With one seed it is unknown and left out: the interval is then that of this run, not of the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from common.evaluation.accuracy import Z95, Accuracy, Change, Interval, align_rows, change, effective_n, wilson

Rows = Mapping[str, float]
"""Maps a row's id to its share of right answers in one run."""
PSEUDO_ROWS = 4.0
"""Artificial rows of a ratio's interval, spread evenly over all combinations of right and wrong (Agresti and Coull's
"plus four"). Without them the interval has no width when no row differs."""


def accuracy_over_seeds(runs: Sequence[Rows]) -> Accuracy:
    """Compute the mean over one or more runs and their rows, with Wilson's interval at the effective sample size.

    Raises ValueError if the runs have different rows.
    """
    scores = align_rows(*runs)
    seeds, rows = scores.shape
    mean = float(scores.mean())
    variance = float(scores.mean(axis=0).var()) / rows + float(_seed_covariance(scores[..., None])[0, 0])
    n = effective_n(mean, variance, max_n=rows * seeds, if_constant=rows)
    return Accuracy(mean, rows, wilson(mean, n), seeds, dict(zip(runs[0], scores.mean(axis=0).tolist(), strict=True)))


def change_over_seeds(before: Sequence[Rows], after: Sequence[Rows]) -> Change:
    """Compute the mean of after minus before, paired by row and run. The interval is that of `accuracy.change`, widened
    by the variance over runs. Raises ValueError if rows or numbers of runs are not the same.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} runs cannot be paired")
    over_rows = change(accuracy_over_seeds(before), accuracy_over_seeds(after))
    scores = align_rows(*before, *after)
    differences = scores[len(before) :] - scores[: len(before)]
    low, high = over_rows.ci95
    half = (high - low) / 2
    wider = math.hypot(half, Z95 * math.sqrt(_seed_covariance(differences[..., None])[0, 0])) - half
    return Change(over_rows.change, (max(-1.0, low - wider), min(1.0, high + wider)))


def gap_closed(
    base: Sequence[Rows], in_context: Sequence[Rows], final: Sequence[Rows]
) -> tuple[float | None, Interval | None]:
    """Return the share of the context's benefit that the weights hold, mean gain over mean gap, and its interval.

    The gain is final minus base, the gap in context minus base, both paired by row and run. The interval is Fieller's
    (1954), with `PSEUDO_ROWS`: the ratios r for which gain - r * gap may be zero. The value is None without a gap; the
    interval is None if the gap itself may be zero. Raises ValueError if the rows are not the same.
    """
    stacked = np.stack(np.split(align_rows(*base, *in_context, *final), 3), axis=-1)
    pairs = stacked[..., [2, 1]] - stacked[..., [0]]  # [runs, rows, (gain, gap)]
    gain, gap = pairs.mean(axis=(0, 1))
    value = float(gain / gap) if gap else None
    rows, total = pairs.mean(axis=0), pairs.shape[1] + PSEUDO_ROWS
    mean = rows.sum(axis=0) / total
    # Over the eight combinations of right and wrong, a difference has mean square 1/2, two with one term in common 1/4.
    square = (rows.T @ rows + PSEUDO_ROWS * np.array([[0.5, 0.25], [0.25, 0.5]])) / total
    covariance = (square - np.outer(mean, mean)) / total + _seed_covariance(pairs)
    return value, fieller(mean, covariance)


def fieller(mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> Interval | None:
    """Return Fieller's 95% interval of ``mean[0] / mean[1]`` for means ``[2]`` with a covariance ``[2, 2]``.

    None if the denominator may be zero.
    """
    (c, b), (_, a) = np.outer(mean, mean) - Z95**2 * covariance
    if a <= 0:
        return None
    half = math.sqrt(max(b * b - a * c, 0.0))
    return float((b - half) / a), float((b + half) / a)


def _seed_covariance(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the covariance ``[m, m]`` of the means over runs of ``scores [runs, rows, m]``, estimated from the runs'
    means. It is enlarged so that `Z95` standard deviations are Student's 95% quantile. Zero for a single run.
    """
    runs, _, figures = scores.shape
    if runs == 1:
        return np.zeros((figures, figures))
    enlarged = (stdtrit(runs - 1, 0.975) / Z95) ** 2
    return np.asarray(enlarged * np.atleast_2d(np.cov(scores.mean(axis=1), rowvar=False)) / runs)
