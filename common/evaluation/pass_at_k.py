"""pass@k: the probability that at least one of k answers to a row is right, from n >= k sampled answers. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.evaluation.accuracy import Accuracy
from common.evaluation.multi_seed import Rows, accuracy_over_seeds


def ks(samples: int) -> list[int]:
    """Return the k above 1 to report for `samples` answers a row: powers of two below it, and itself."""
    powers = [2**exponent for exponent in range(1, samples.bit_length())]
    return [*(k for k in powers if k < samples), *([samples] if samples > 1 else [])]


def rows_at_k(shares: Rows, samples: int, k: int) -> dict[str, float]:
    """Return each row's pass@k from its share of right answers: ``1 - C(n - c, k) / C(n, k)`` with c of n right.

    The estimate is unbiased for answers sampled independently (Chen et al. 2021, "Evaluating Large Language Models
    Trained on Code"). Raises ValueError for k outside 1 to `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} answers a row, there are {samples}")
    whole = math.comb(samples, k)
    return {row: 1 - math.comb(samples - round(share * samples), k) / whole for row, share in shares.items()}


def pass_at(result: Accuracy) -> dict[str, dict[str, Any]]:
    """Return pass@k with its interval over rows, as JSON values by k; empty with one answer a row."""
    return {str(k): _at_k(rows_at_k(result.rows, result.samples, k)) for k in ks(result.samples)}


def _at_k(rows: Mapping[str, float]) -> dict[str, Any]:
    found = accuracy_over_seeds([rows])
    return {"value": found.accuracy, "ci95": list(found.ci95)}
