"""Requests to and answers from vLLM as arrays, and the proof that an answer holds every row. Pure: no engine here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.protocol.schema import F32, LOGPROB_FLOOR, PAD_ID, Ids, ItemError, ItemScore, Mask, as_ids
from teacher_server.backends.base import Work
from teacher_server.backends.vllm.worker import FIXED_COLUMNS

MASS_NATS = 1e-3
"""How far the log of a row's whole mass, support and tail together, may be from 0. In f32 it is off by some 1e-6."""


class RowsLost(Exception):
    """The engine's answer does not hold every scored row, or holds something else; the text says what."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """f32 scores of one item, checked: ``sampled [T]``, ``tail [T]``, ``logprobs [T, width]`` at ``ids`` (None: those
    of the request).
    """

    sampled: F32
    tail: F32
    logprobs: F32
    ids: Ids | None


def fault_of(work: Work, vocab_size: int) -> ItemError | None:
    """Why the support of an item cannot be asked for; None where it can."""
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


def fixed_ids(work: Work, vocab_size: int) -> NDArray[np.int32]:
    """What is asked of `vllm_worker.fixed_id_rows`: ``[T, 2 + w + 2k]``.

    An id that the model lacks is asked for as another one of its row, and gets the floor afterwards.
    """
    tokens = work.item.response_ids.size
    k = work.k if work.mode in ("teacher_topk", "union") else 0
    head = np.stack([work.item.response_ids, np.full(tokens, k)], axis=1)
    support = _support(work)
    known = support < vocab_size
    if not known.all():
        first = np.take_along_axis(support, known.argmax(axis=1)[:, None], axis=1)
        support = np.where(known, support, first)
    return np.concatenate([head, support, np.zeros((tokens, 2 * k))], axis=1).astype(np.int32)


def rows_of_fixed_ids(values: F32 | None, work: Work, vocab_size: int) -> Rows:
    """The answer to `fixed_ids`; raises RowsLost."""
    if values is None:
        raise RowsLost("no scores came back")
    support = _support(work)
    tokens, width = support.shape
    k = work.k if work.mode in ("teacher_topk", "union") else 0
    if values.shape != (tokens, FIXED_COLUMNS + width + 2 * k):
        raise RowsLost(f"scores of shape {list(values.shape)} for {tokens} tokens and {width} + {k} ids")
    split = [FIXED_COLUMNS, FIXED_COLUMNS + width, FIXED_COLUMNS + width + k]
    head, asked, picked, of_picked = np.split(values.astype(np.float32, copy=False), split, axis=1)
    lacking = support >= vocab_size
    logprobs = np.concatenate([np.where(lacking, np.float32(LOGPROB_FLOOR), asked), of_picked], axis=1)
    ids = np.concatenate([support, _as_whole_ids(picked, vocab_size)], axis=1) if k else None
    return _checked(Rows(head[:, 0], head[:, 1], logprobs, ids))


def rows_of_top_k(flat: Any, work: Work, vocab_size: int) -> Rows:
    """From vLLM's ``FlatLogprobs`` of all prompt tokens, rows as of `vllm_worker.top_k_rows`; raises RowsLost."""
    if flat is None:
        raise RowsLost("no scores came back")
    k = work.k if work.mode == "teacher_topk" else 0
    tokens, width = work.item.response_ids.size, 2 + k
    # Position 0 has no row; the response's rows are the last ones.
    starts, ends = flat.start_indices[1:][-tokens:], flat.end_indices[1:][-tokens:]
    if len(starts) != tokens or ends[-1] - starts[0] != tokens * width:
        raise RowsLost(f"{len(starts)} rows of scores for {tokens} tokens")
    ids = np.asarray(flat.token_ids[starts[0] : ends[-1]], dtype=np.int64).reshape(tokens, width)
    values = np.asarray(flat.logprobs[starts[0] : ends[-1]], dtype=np.float32).reshape(tokens, width)
    if (ids[:, 0] != work.item.response_ids).any():
        raise RowsLost("rows of other tokens than the response's came back")
    picked = _as_whole_ids(ids[:, 1:-1], vocab_size) if k else None
    return _checked(Rows(values[:, 0], values[:, -1], values[:, 1:-1], picked))


def _as_whole_ids(values: NDArray[Any], vocab_size: int) -> Ids:
    whole = np.isfinite(values) & (values == np.floor(values))
    if not (whole & (values >= 0) & ((values < vocab_size) | (values == PAD_ID))).all():
        raise RowsLost("ids came back that the model does not have")
    return as_ids(values.astype(np.int64))


def _checked(rows: Rows) -> Rows:
    """`rows`, if they are log-probs and each row's mass, support and tail together, is 1; raises RowsLost."""
    for values in (rows.sampled, rows.tail, rows.logprobs):
        if not np.isfinite(values).all():
            raise RowsLost("rows that were never written, or of a model that gave no numbers")
        if (values > MASS_NATS).any():
            raise RowsLost(f"a log-probability of {float(values.max()):.3g}")
    own = rows.logprobs if rows.ids is None else np.where(rows.ids == PAD_ID, LOGPROB_FLOOR, rows.logprobs)
    terms = np.concatenate([own, rows.tail[:, None]], axis=1).astype(np.float64)
    mass = np.logaddexp.reduce(terms, axis=1)
    if (np.abs(mass) > MASS_NATS).any():
        row = int(np.abs(mass).argmax())
        raise RowsLost(f"the mass of row {row} is e**{mass[row]:.3g}, not 1")
    return rows


def item_score(rows: Rows, work: Work) -> ItemScore:
    """Rows as they travel; the floor counted where it stands for a value."""
    values = rows.logprobs
    asked: Mask = np.ones(values.shape, dtype=np.bool_) if rows.ids is None else rows.ids != PAD_ID
    floored = sum(int((part <= LOGPROB_FLOOR).sum()) for part in (values[asked], rows.sampled, rows.tail))
    return ItemScore(
        logprobs=values.astype(np.float16),
        sampled_logprob=np.ascontiguousarray(rows.sampled),
        tail_logprob=np.ascontiguousarray(rows.tail),
        topk_ids=rows.ids if work.mode in ("teacher_topk", "union") else None,
        floored=floored,
    )


def empty_score(work: Work) -> ItemScore:
    """The score of an empty response: no positions."""
    picks = work.k if work.mode in ("teacher_topk", "union") else 0
    width = _support(work).shape[1] + picks
    none = np.empty(0, dtype=np.float32)
    ids = as_ids(np.empty((0, width))) if picks else None
    return ItemScore(np.empty((0, width), dtype=np.float16), none, none, ids)


def _support(work: Work) -> Ids:
    ids = work.item.topk_ids
    return as_ids(np.empty((work.item.response_ids.size, 0))) if ids is None else ids
