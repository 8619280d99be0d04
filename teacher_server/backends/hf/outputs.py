"""Log-probs from hidden states: the output layer in chunks, full-vocabulary log-softmax in f32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from common.float32_head import float32_linear
from common.models.logits import LogitTransform
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID, ScoreMode

CHUNK_BYTES = 64 * 1024 * 1024
"""Maximum bytes of f32 logits in memory on a GPU."""

CPU_CHUNK_BYTES = CHUNK_BYTES // 2
"""The same on CPU. Half is as fast as the whole; an eighth takes 1.5 times as long."""


@dataclass(frozen=True, slots=True, eq=False)
class PositionScores:
    """Scores of n positions (f32): ``logprobs [n, k]``, ``sampled [n]``, ``tail [n]``; ``ids [n, k]`` if the teacher
    picked any. ``floored [n]`` counts clamped values, ``finite [n]`` is False for NaN or infinite logits, and
    ``repeated [n]`` is True if the requested support holds an id twice.
    """

    logprobs: Tensor
    sampled: Tensor
    tail: Tensor
    ids: Tensor | None
    floored: Tensor
    finite: Tensor
    repeated: Tensor


def score_hidden(
    hidden: Tensor,
    output_layer: Any,
    transform: LogitTransform,
    vocab_size: int,
    *,
    sampled: Tensor,
    ids: Tensor | None,
    mode: ScoreMode,
    temperature: float,
    k: int,
) -> PositionScores:
    """Scores of n positions from ``hidden [n, H]`` and the model's linear `output_layer` and logit `transform`.

    At most `CHUNK_BYTES` of logits are in memory.
    """
    chunk = CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES
    rows = max(1, chunk // (4 * vocab_size))
    parts = [
        score_logits(
            transform(
                float32_linear(hidden[start : start + rows], output_layer.weight, getattr(output_layer, "bias", None))
            ),
            sampled=sampled[start : start + rows],
            ids=None if ids is None else ids[start : start + rows],
            mode=mode,
            temperature=temperature,
            k=k,
        )
        for start in range(0, hidden.shape[0], rows)
    ]
    columns = [[getattr(part, column.name) for part in parts] for column in fields(PositionScores)]
    merged: Any = (None if column[0] is None else torch.cat(column) for column in columns)
    return PositionScores(*merged)


def score_logits(
    logits: Tensor, *, sampled: Tensor, ids: Tensor | None, mode: ScoreMode, temperature: float, k: int
) -> PositionScores:
    """Scores from ``logits [n, V]`` (f32, overwritten). Ids at or above V, which the teacher lacks, get the floor."""
    if temperature != 1.0:
        logits = logits.div_(temperature)
    picked = logits.topk(min(k, logits.shape[-1]), dim=-1).indices if mode in ("teacher_topk", "union") else None
    if mode == "teacher_topk":
        assert picked is not None
        support = picked
    elif mode == "union":
        assert picked is not None
        assert ids is not None
        support = torch.cat([ids, picked.masked_fill(_contained(picked, ids), PAD_ID)], dim=-1)
    else:
        support = ids if ids is not None else sampled.new_empty((sampled.shape[0], 0))
    width = logits.shape[-1]
    lacking = support >= width
    if bool(lacking.any()) or bool((sampled >= width).any()):
        # An extra column stands for the ids that the model lacks.
        logits = torch.nn.functional.pad(logits, (0, 1), value=float("-inf"))
        columns, sampled = support.clamp(max=width), sampled.clamp(max=width)
    else:
        columns = support
    # Subtract the row maximum: logits of some models are in the hundreds, with f32 rounding to match.
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    at_support, at_sampled = logits.gather(-1, columns), logits.gather(-1, sampled[:, None])[:, 0]
    # Sum the mass outside the support from its own terms: 1 - sum would lose it to rounding. Reuse the logits' memory.
    outside = logits.scatter_(-1, columns, float("-inf"))
    top = outside.amax(-1, keepdim=True).clamp_(min=torch.finfo(outside.dtype).min)  # -inf: no mass outside
    log_outside = top[:, 0] + outside.sub_(top).exp_().sum(-1).log()
    normaliser = torch.logaddexp(_log_inside(at_support, columns), log_outside)
    logprobs, sampled_logprob = at_support - normaliser[:, None], at_sampled - normaliser
    tail = log_outside - normaliser
    present = logprobs if mode != "union" else logprobs.masked_fill(support == PAD_ID, 0.0)
    floored = (present < LOGPROB_FLOOR).sum(-1) + (sampled_logprob < LOGPROB_FLOOR) + (tail < LOGPROB_FLOOR)
    return PositionScores(
        logprobs=logprobs.clamp_(min=LOGPROB_FLOOR),
        sampled=sampled_logprob.clamp_(min=LOGPROB_FLOOR),
        tail=tail.clamp_(min=LOGPROB_FLOOR),
        ids=support if mode in ("teacher_topk", "union") else None,
        floored=floored,
        finite=normaliser.isfinite(),
        repeated=_repeated(ids) if ids is not None else torch.zeros_like(sampled, dtype=torch.bool),
    )


def _log_inside(at_support: Tensor, columns: Tensor) -> Tensor:
    """``[n]``: log of the mass at `columns`, each counted once: ids that the model lacks share one column."""
    ordered, order = columns.sort(dim=-1)
    repeats = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (min(1, ordered.shape[1]), 0))
    return at_support.gather(-1, order).masked_fill(repeats, float("-inf")).logsumexp(-1)


def _repeated(ids: Tensor) -> Tensor:
    """``[n]``: True if an id occurs twice in its row; its mass would count twice."""
    ordered = ids.sort(dim=-1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(-1)


def _contained(picked: Tensor, ids: Tensor) -> Tensor:
    """``[n, k]``: True if the id of `picked` occurs in the same row of `ids`; needs no [n, k, k] tensor."""
    ordered = ids.sort(dim=-1).values
    index = torch.searchsorted(ordered, picked.contiguous()).clamp(max=ids.shape[-1] - 1)
    return ordered.gather(-1, index) == picked


def spans(lengths: list[int]) -> Iterator[slice]:
    """Consecutive slices of the given lengths."""
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length
