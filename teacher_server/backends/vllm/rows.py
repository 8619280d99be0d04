"""Arrays of vLLM requests and results, and validation that a result holds every row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.protocol.schema import F32, LOGPROB_FLOOR, PAD_ID, Ids, as_ids
from teacher_server.backends.base import Work
from teacher_server.backends.rows import InvalidRows, Rows, support_of
from teacher_server.backends.vllm.worker import FIXED_COLUMNS

MASS_NATS = 1e-3
"""Allowed distance from 0 of the log of a row's mass (support and tail); f32 rounding is about 1e-6."""


def fixed_ids(work: Work, vocab_size: int) -> NDArray[np.int32]:
    """Request ids of `worker.fixed_id_rows`: ``[T, 2 + w + 2k]``.

    Another id of the row replaces an id that the model lacks; `rows_of_fixed_ids` gives that id the floor.
    """
    tokens = work.item.response_ids.size
    k = work.teacher_ids
    head = np.stack([work.item.response_ids, np.full(tokens, k)], axis=1)
    support = support_of(work)
    known = support < vocab_size
    if not known.all():
        first = np.take_along_axis(support, known.argmax(axis=1)[:, None], axis=1)
        support = np.where(known, support, first)
    return np.concatenate([head, support, np.zeros((tokens, 2 * k))], axis=1).astype(np.int32)


def rows_of_fixed_ids(values: F32 | None, work: Work, vocab_size: int) -> Rows:
    """Rows of the result of a `fixed_ids` request. Raises InvalidRows."""
    if values is None:
        raise InvalidRows("the result holds no scores")
    support = support_of(work)
    tokens, width = support.shape
    k = work.teacher_ids
    if values.shape != (tokens, FIXED_COLUMNS + width + 2 * k):
        raise InvalidRows(f"scores of shape {list(values.shape)} for {tokens} tokens and {width} + {k} ids")
    split = [FIXED_COLUMNS, FIXED_COLUMNS + width, FIXED_COLUMNS + width + k]
    head, at_support, teacher_ids, at_teacher_ids = np.split(values.astype(np.float32, copy=False), split, axis=1)
    lacking = support >= vocab_size
    logprobs = np.concatenate([np.where(lacking, np.float32(LOGPROB_FLOOR), at_support), at_teacher_ids], axis=1)
    ids = np.concatenate([support, _whole_ids(teacher_ids, vocab_size)], axis=1) if k else None
    return _validated(Rows(head[:, 0], head[:, 1], logprobs, ids))


def rows_of_top_k(flat: Any, work: Work, vocab_size: int) -> Rows:
    """Rows of `worker.top_k_rows` from vLLM's ``FlatLogprobs`` of all prompt tokens. Raises InvalidRows."""
    if flat is None:
        raise InvalidRows("the result holds no scores")
    k = work.teacher_ids
    tokens, width = work.item.response_ids.size, 2 + k
    # Position 0 has no row, and the response's rows are the last ones.
    starts, ends = flat.start_indices[1:][-tokens:], flat.end_indices[1:][-tokens:]
    if len(starts) != tokens or ends[-1] - starts[0] != tokens * width:
        raise InvalidRows(f"{len(starts)} rows of scores for {tokens} tokens")
    ids = np.asarray(flat.token_ids[starts[0] : ends[-1]], dtype=np.int64).reshape(tokens, width)
    values = np.asarray(flat.logprobs[starts[0] : ends[-1]], dtype=np.float32).reshape(tokens, width)
    if (ids[:, 0] != work.item.response_ids).any():
        raise InvalidRows("the rows belong to other tokens than the response's")
    teacher_ids = _whole_ids(ids[:, 1:-1], vocab_size) if k else None
    return _validated(Rows(values[:, 0], values[:, -1], values[:, 1:-1], teacher_ids))


def _whole_ids(values: NDArray[Any], vocab_size: int) -> Ids:
    whole = np.isfinite(values) & (values == np.floor(values))
    if not (whole & (values >= 0) & ((values < vocab_size) | (values == PAD_ID))).all():
        raise InvalidRows("the rows hold ids that the model lacks")
    return as_ids(values.astype(np.int64))


def _validated(rows: Rows) -> Rows:
    """Return `rows` if all are log-probs and the mass of each row, support and tail, is 1. Raises InvalidRows."""
    for values in (rows.sampled, rows.tail, rows.logprobs):
        if not np.isfinite(values).all():
            raise InvalidRows("rows are NaN or infinite: never written, or from NaN or infinite logits")
        if (values > MASS_NATS).any():
            raise InvalidRows(f"a log-probability of {float(values.max()):.3g}")
    logprobs = rows.logprobs if rows.ids is None else np.where(rows.ids == PAD_ID, LOGPROB_FLOOR, rows.logprobs)
    terms = np.concatenate([logprobs, rows.tail[:, None]], axis=1).astype(np.float64)
    mass = np.logaddexp.reduce(terms, axis=1)
    if (np.abs(mass) > MASS_NATS).any():
        row = int(np.abs(mass).argmax())
        raise InvalidRows(f"the mass of row {row} is e**{mass[row]:.3g}, not 1")
    return rows
