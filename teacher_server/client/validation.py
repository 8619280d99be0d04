"""Whether a score is a score of its item: a learner must never train on half of one, or on what are no log-probs."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.protocol.schema import LOGPROB_FLOOR, ItemScore, ScoreItem, ScoreMode

HIGHEST = 0.01
"""A log-prob is at most 0, but for rounding."""


def misfit(score: ItemScore, item: ScoreItem, mode: ScoreMode, k: int) -> str | None:
    """What is wrong with `score` as an answer to `item` in `mode` with the teacher's own `k`; None: nothing."""
    tokens = int(item.response_ids.size)
    asked = item.topk_ids if mode in ("at_ids", "union") else None
    picks = mode in ("teacher_topk", "union")
    width = (0 if asked is None else int(asked.shape[1])) + (k if picks else 0)
    shapes = {
        "log-probs": (score.logprobs.shape, (tokens, width)),
        "sampled log-probs": (score.sampled_logprob.shape, (tokens,)),
        "tail": (score.tail_logprob.shape, (tokens,)),
        "ids": (None if score.topk_ids is None else score.topk_ids.shape, (tokens, width) if picks else None),
    }
    for name, (came, meant) in shapes.items():
        if came != meant:
            return f"{name} of shape {came} came back for {tokens} response tokens, expected {meant}"
    if asked is not None and score.topk_ids is not None and (score.topk_ids[:, : asked.shape[1]] != asked).any():
        return "other ids came back than were asked for"
    values: dict[str, np.ndarray[Any, Any]] = {
        "log-probs": score.logprobs,
        "sampled log-probs": score.sampled_logprob,
        "tail": score.tail_logprob,
    }
    for name, array in values.items():
        if array.size and not _are_logprobs(array):
            return f"{name} from {array.min()} to {array.max()} came back, expected {LOGPROB_FLOOR:g} to 0"
    return None


def _are_logprobs(values: np.ndarray[Any, Any]) -> bool:
    # A NaN is both the least and the greatest value, and in no interval.
    return bool(values.min() >= LOGPROB_FLOOR and values.max() <= HIGHEST)
