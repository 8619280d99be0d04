"""How well a model predicts a text it has nothing to do with: what distillation may have cost. Pure.

Nats per token, not their exponential: differences of nats mean the same at every level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.accuracy import Change, resampled
from common.protocol.schema import Ids, TokenSequence


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Mean negative log-prob of a text's tokens, in nats; `chunks` are (sum of nats, tokens) of its pieces."""

    nats: float
    tokens: int
    chunks: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Perplexity:
        """From what ``dataclasses.asdict`` made of one, lists for tuples."""
        return cls(**{**state, "chunks": tuple((nats, tokens) for nats, tokens in state["chunks"])})


def chunks_of(ids: Ids, size: int) -> list[TokenSequence]:
    """`ids` cut into sequences of at most `size` tokens, the first of each the last of the one before.

    So every token but the text's first is predicted exactly once, from what stands before it in its own chunk. Raises
    ValueError for a text of fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens, at least two are needed")
    step = size - 1
    starts = range(0, len(ids) - 1, step)
    return [TokenSequence(ids[start : start + 1], ids[start + 1 : start + size]) for start in starts]


def perplexity(logprobs: Sequence[NDArray[np.float32]]) -> Perplexity:
    """From the log-probs of each chunk's tokens, ``[T]`` each. Raises ValueError where one is no number."""
    chunks = tuple((-float(values.astype(np.float64).sum()), len(values)) for values in logprobs)
    nats, tokens = sum(nats for nats, _ in chunks), sum(tokens for _, tokens in chunks)
    if not np.isfinite(nats):
        raise ValueError("the model gives a token of the text no finite log-prob")
    return Perplexity(nats / tokens, tokens, chunks)


def perplexity_change(before: Perplexity, after: Perplexity, seed: int = 0) -> Change | None:
    """After minus before in nats per token (above zero: the text is predicted worse); 95% percentile interval of a
    paired bootstrap over chunks. None for a text of one chunk.

    Raises ValueError where the chunks are not the same.
    """
    first, second = np.array(before.chunks), np.array(after.chunks)
    if first.shape != second.shape or (first[:, 1] != second[:, 1]).any():
        raise ValueError(f"texts of {before.tokens} and {after.tokens} tokens are not the same text")
    if len(first) < 2:
        return None
    columns = np.stack([second[:, 0] - first[:, 0], first[:, 1]], axis=-1)
    means = resampled(columns, np.random.default_rng(seed))
    low, high = np.quantile(means[:, 0] / means[:, 1], (0.025, 0.975))
    return Change(after.nats - before.nats, (float(low), float(high)))
