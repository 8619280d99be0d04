"""Validation of scores, so that the learner never trains on incomplete scores or on values that are not log-probs."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.protocol.schema import LOGPROB_FLOOR, ItemScore, ScoreItem, ScoreMode

MAX_LOGPROB = 0.01
"""Allowed rounding error above 0."""


def score_error(score: ItemScore, item: ScoreItem, mode: ScoreMode, k: int) -> str | None:
    """Validate a score's shapes, ids and values against its request; returns the first error, or None.

    `k` is the number of ids that the teacher picks in modes ``teacher_topk`` and ``union``.
    """
    tokens = int(item.response_ids.size)
    requested = item.topk_ids if mode in ("at_ids", "union") else None
    picks = mode in ("teacher_topk", "union")
    width = (0 if requested is None else int(requested.shape[1])) + (k if picks else 0)
    shapes = {
        "log-probs": (score.logprobs.shape, (tokens, width)),
        "sampled log-probs": (score.sampled_logprob.shape, (tokens,)),
        "tail": (score.tail_logprob.shape, (tokens,)),
        "ids": (None if score.topk_ids is None else score.topk_ids.shape, (tokens, width) if picks else None),
    }
    for name, (shape, expected) in shapes.items():
        if shape != expected:
            return f"{name} of shape {shape} for {tokens} response tokens, expected {expected}"
    if (
        requested is not None
        and score.topk_ids is not None
        and (score.topk_ids[:, : requested.shape[1]] != requested).any()
    ):
        return "the score has other ids than the request"
    values: dict[str, np.ndarray[Any, Any]] = {
        "log-probs": score.logprobs,
        "sampled log-probs": score.sampled_logprob,
        "tail": score.tail_logprob,
    }
    for name, array in values.items():
        if array.size and not _are_logprobs(array):
            return f"{name} from {array.min()} to {array.max()}, expected {LOGPROB_FLOOR:g} to 0"
    return None


def _are_logprobs(values: np.ndarray[Any, Any]) -> bool:
    # min and max of values with a NaN are NaN, which fails both comparisons.
    return bool(values.min() >= LOGPROB_FLOOR and values.max() <= MAX_LOGPROB)
