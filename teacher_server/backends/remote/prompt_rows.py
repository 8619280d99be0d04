"""Rows of scores from vLLM's JSON, with their checks and tails.

A row maps ids to log-probs: first the token that follows (``rank``: its place in the vocabulary), then the k most
likely ids (``rank`` 1 to k), among which the token may be. vLLM computes the log-probs in f32 from the raw logits,
without temperature and without penalties, and JSON carries them exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.protocol.schema import F32, LOGPROB_FLOOR, PAD_ID, Ids, as_ids
from teacher_server.backends.rows import InvalidRows, Rows

Values = NDArray[np.float64]

MASS_ERROR = 1e-5
"""Bound for the error of a row's mass: the f32 rounding of log-probs of logits up to 128 is 2**-24 * 128. Masses above
1 by more are refused, and a tail that is not larger is not resolved."""

VLLM_FLOOR = -9999.0
"""vLLM replaces -inf by this value."""


class _Entry(msgspec.Struct):
    logprob: float
    rank: int | None = None


def top_k_rows(raws: Sequence[msgspec.Raw], following: Ids, k: int, vocab_size: int) -> Rows:
    """Rows at the teacher's `k` best ids from the JSON of one row for each token of `following`. Raises InvalidRows."""
    tokens = int(following.size)
    sampled, logprobs, top = np.empty(tokens), np.empty((tokens, k)), np.empty((tokens, k), dtype=np.int64)
    for row, (raw, token) in enumerate(zip(raws, following.tolist(), strict=True)):
        sampled[row], top[row], logprobs[row] = _row(raw, token, k, row)
    _check_values(sampled, logprobs)
    if not k:
        return Rows(_floored(sampled), np.zeros(tokens, dtype=np.float32), _floored(logprobs), None)
    if (top < 0).any() or (top >= vocab_size).any():
        raise InvalidRows(f"id {int(top.max())} is not in the vocabulary of {vocab_size}")
    if (np.diff(logprobs, axis=1) > 0).any():
        raise InvalidRows("the most likely ids are not in order")
    mass = np.exp(logprobs).sum(axis=1)
    if (mass < k / vocab_size * (1 - MASS_ERROR)).any():
        raise InvalidRows(
            f"the {k} most likely of {vocab_size} ids have a mass of {mass.min():.3g} in row {int(mass.argmin())}: not "
            "log-probs (the endpoint's --logprobs-mode must be raw_logprobs)"
        )
    tail = _log_tail(mass, most=(vocab_size - k) * np.exp(logprobs[:, -1]))
    return Rows(_floored(sampled), tail, _floored(logprobs), as_ids(top))


def fixed_id_rows(sampled: Values, logprobs: Values, following: Ids, support: Ids, vocab_size: int) -> Rows:
    """Rows at the requested ids ``support [T, w]`` from the log-probs of the tokens `following` and of these ids.

    Ids that the model lacks have -inf. Raises InvalidRows.
    """
    sampled, logprobs = np.maximum(sampled, VLLM_FLOOR), np.maximum(logprobs, VLLM_FLOOR)  # NaN stays
    _check_values(sampled, logprobs)
    own = support == following[:, None]
    if (np.abs(logprobs - sampled[:, None])[own] > MASS_ERROR).any():
        raise InvalidRows("the log-probs of a token and of the same id in its support differ")
    mass = np.exp(logprobs).sum(axis=1)
    outside = vocab_size - (support < vocab_size).sum(axis=1)
    tail = _log_tail(mass, most=np.minimum(outside, 1.0)) if support.shape[1] else np.zeros(len(mass), dtype=np.float32)
    return Rows(_floored(sampled), tail, _floored(logprobs), None)


def union_rows(fixed: Rows, support: Ids, top: Rows, vocab_size: int) -> Rows:
    """Rows of `fixed` at ``support [T, w]``, then those ids of `top` that are not in it. Raises InvalidRows."""
    assert top.ids is not None
    if (np.abs(fixed.sampled - top.sampled) > MASS_ERROR).any():
        raise InvalidRows("the rows of given ids and those of the most likely ids differ")
    row = np.arange(len(support), dtype=np.int64)[:, None] << 32
    inside = np.isin(row + top.ids, row + support)
    logprobs = np.concatenate([fixed.logprobs, np.where(inside, np.float32(LOGPROB_FLOOR), top.logprobs)], axis=1)
    ids = np.concatenate([support, np.where(inside, PAD_ID, top.ids)], axis=1)
    _check_values(fixed.sampled, logprobs)
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    outside = vocab_size - (support < vocab_size).sum(axis=1) - (~inside).sum(axis=1)
    tail = _log_tail(mass, most=outside * np.exp(top.logprobs[:, -1].astype(np.float64)))
    return Rows(fixed.sampled, tail, logprobs, as_ids(ids))


def _row(raw: msgspec.Raw, token: int, k: int, row: int) -> tuple[float, list[int], list[float]]:
    """The token's log-prob, the k best ids, best first, and their log-probs. Raises InvalidRows."""
    try:
        entries = msgspec.json.decode(raw, type=dict[int, _Entry])
    except msgspec.DecodeError as error:
        raise InvalidRows(f"row {row} is no map of ids to log-probs: {str(error)[:100]}") from error
    if next(iter(entries), None) != token:
        raise InvalidRows(f"row {row} is not that of token {token}, which follows")
    own = entries[token]
    if len(entries) == k + 1:
        del entries[token]
    best = sorted(entries.items(), key=lambda entry: entry[1].rank or 0)
    if [entry.rank for _, entry in best] != list(range(1, k + 1)):
        raise InvalidRows(f"row {row} does not hold the {k} most likely ids: it has {len(best)}")
    if best and token not in entries and own.logprob > best[-1][1].logprob:
        raise InvalidRows(f"token {token} of row {row} is more likely than the last of the {k} most likely ids")
    return own.logprob, [index for index, _ in best], [entry.logprob for _, entry in best]


def _check_values(sampled: Values | F32, logprobs: Values | F32) -> None:
    """Check that all values are log-probs, and the mass of each row. Raises InvalidRows."""
    values = np.concatenate([sampled[:, None], logprobs], axis=1, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InvalidRows("rows hold values that are not finite")
    if (values > MASS_ERROR).any():
        raise InvalidRows(f"a log-probability of {values.max():.3g}")
    mass = np.exp(values[:, 1:]).sum(axis=1)
    if (mass > 1 + MASS_ERROR).any():
        raise InvalidRows(f"the mass of row {int(mass.argmax())} is 1 + {mass.max() - 1:.3g}")


def _log_tail(mass: Values, *, most: Values) -> F32:
    """Log of the rest of `mass` ``[T]``, in f64. The mass is known to `MASS_ERROR`, so a smaller rest counts as
    `MASS_ERROR`, but never as more than `most`, what the ids outside can have.
    """
    tail = np.minimum(np.maximum(1 - mass, MASS_ERROR), most)
    with np.errstate(divide="ignore"):
        return _floored(np.log(tail))


def _floored(values: Values) -> F32:
    """Values as f32; what vLLM gives for -inf becomes the floor of the protocol."""
    return np.where(values <= VLLM_FLOOR, LOGPROB_FLOOR, values).astype(np.float32)
