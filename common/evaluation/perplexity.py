"""Perplexity on unrelated text, a measure of forgetting.

In nats per token: a difference of nats means the same at every level, a difference of exponentials does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from common.evaluation.accuracy import Change
from common.protocol.schema import Ids, TokenSequence


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-prob of a text's tokens, in nats; `chunks` holds (sum of nats, tokens) of each chunk."""

    nats: float
    tokens: int
    chunks: tuple[tuple[float, int], ...] = ()

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Perplexity:
        """Rebuild from ``dataclasses.asdict``, also after JSON turned tuples into lists."""
        return cls(**{**state, "chunks": tuple((nats, tokens) for nats, tokens in state["chunks"])})


def split_into_chunks(ids: Ids, size: int) -> list[TokenSequence]:
    """Split `ids` into sequences of at most `size` tokens; each starts with the last token of the one before.

    Every token but the first is thus predicted exactly once, from the tokens before it in its chunk. Raises ValueError
    for fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, at least two are needed")
    step = size - 1
    starts = range(0, len(ids) - 1, step)
    return [TokenSequence(ids[start : start + 1], ids[start + 1 : start + size]) for start in starts]


def perplexity(logprobs: Sequence[NDArray[np.float32]]) -> Perplexity:
    """Compute the perplexity from each chunk's log-probs ``[T]``. Raises ValueError for a value that is not finite."""
    chunks = tuple((-float(values.astype(np.float64).sum()), len(values)) for values in logprobs)
    nats, tokens = sum(nats for nats, _ in chunks), sum(tokens for _, tokens in chunks)
    if not np.isfinite(nats):
        raise ValueError("the model's log-prob of a token of the text is not finite")
    return Perplexity(nats / tokens, tokens, chunks)


def perplexity_change(before: Perplexity, after: Perplexity) -> Change | None:
    """Compute after minus before in nats per token; above zero the text is predicted worse.

    The 95% interval is Student's over chunks whose differences vary in proportion to their tokens. None for a text of
    one chunk. Raises ValueError if the chunks are not the same.
    """
    first, second = np.array(before.chunks), np.array(after.chunks)
    if first.shape != second.shape or (first[:, 1] != second[:, 1]).any():
        raise ValueError(f"texts of {before.tokens} and {after.tokens} tokens are not the same text")
    chunks = len(first)
    if chunks < 2:
        return None
    tokens, change = first[:, 1], after.nats - before.nats
    deviations = second[:, 0] - first[:, 0] - change * tokens
    variance = float((deviations**2 / tokens).sum()) / (chunks - 1) / before.tokens
    half = float(stdtrit(chunks - 1, 0.975)) * math.sqrt(variance)
    return Change(change, (change - half, change + half))
