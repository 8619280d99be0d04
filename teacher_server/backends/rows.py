"""Validated scores of one item from an engine, and the item's score made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.protocol.schema import F32, LOGPROB_FLOOR, PAD_ID, Ids, ItemError, ItemScore, Mask, as_ids
from teacher_server.backends.base import Work


class InvalidRows(Exception):
    """The engine's result misses rows or holds wrong ones; the message says which."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Validated f32 scores of one item: ``sampled [T]``, ``tail [T]``, ``logprobs [T, width]`` at ``ids`` (None: the
    request's ids).
    """

    sampled: F32
    tail: F32
    logprobs: F32
    ids: Ids | None


def item_score(rows: Rows, work: Work) -> ItemScore:
    """Score of `rows`, with the number of values at the floor."""
    values = rows.logprobs
    present: Mask = np.ones(values.shape, dtype=np.bool_) if rows.ids is None else rows.ids != PAD_ID
    floored = sum(int((part <= LOGPROB_FLOOR).sum()) for part in (values[present], rows.sampled, rows.tail))
    return ItemScore(
        logprobs=values.astype(np.float16),
        sampled_logprob=np.ascontiguousarray(rows.sampled),
        tail_logprob=np.ascontiguousarray(rows.tail),
        topk_ids=rows.ids if work.teacher_ids else None,
        floored=floored,
    )


def support_error(work: Work, vocab_size: int) -> ItemError | None:
    """Error of a support that an engine cannot score; None if it can."""
    ids = work.item.topk_ids
    if ids is None or not ids.size:
        return None
    ordered = np.sort(ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeated.any():
        return ItemError("bad_ids", f"the support at position {int(repeated.argmax())} has an id twice")
    known = (ids < vocab_size).any(axis=1)
    if not known.all():
        return ItemError("bad_ids", f"this model has no id of the support at position {int(known.argmin())}")
    return None


def support_of(work: Work) -> Ids:
    """Requested ids of each position, ``[T, 0]`` if there are none."""
    ids = work.item.topk_ids
    return as_ids(np.empty((work.item.response_ids.size, 0))) if ids is None else ids
