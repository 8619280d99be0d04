"""Layouts of a micro-batch's sequences in the model's input: padded to the longest, or packed end to end.

The hidden state at position ``len(prompt) + t - 1``, the last one that has not seen ``response_ids[t]``, predicts
response token t. Masks come from lengths, never from ``ids != pad``: the padding id is often the end-of-sequence id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from common.protocol.schema import TokenSequence
from learner.trainer.batch_plan import Plan, plan_packed, plan_padded


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Sequences as input of the backbone, with the positions of their R response tokens.

    ``inputs`` are keyword arguments of the backbone, ``input_ids [B, L]`` among them. ``positions [R]`` index the
    flattened ``[B * L]`` hidden states that predict the response tokens ``response_ids [R]``, sequence after sequence.
    ``lengths`` are response lengths.
    """

    inputs: dict[str, Any]
    positions: Int[Tensor, " R"]
    response_ids: Int[Tensor, " R"]
    lengths: tuple[int, ...]

    @property
    def computed_tokens(self) -> int:
        """Tokens of a forward pass, padding included."""
        return int(self.inputs["input_ids"].numel())

    def to(self, device: torch.device) -> SequenceBatch:
        """Return the batch on `device`."""
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in self.inputs.items()}
        return replace(
            self, inputs=inputs, positions=self.positions.to(device), response_ids=self.response_ids.to(device)
        )


def pad_sequences(sequences: Sequence[TokenSequence]) -> SequenceBatch:
    """Lay each prompt + response in one row, padded on the right: ``input_ids`` and ``attention_mask [B, L]``.

    Right padding needs no position ids: they count from 0 in every row, and causality hides padding from real tokens.
    Raises ValueError for an empty prompt (nothing would predict the first response token) or an empty response.
    """
    joined = _joined(sequences)
    longest = max(map(len, joined))
    input_ids = np.zeros((len(joined), longest), dtype=np.int64)
    mask = np.zeros((len(joined), longest), dtype=np.int64)
    for row, ids in enumerate(joined):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    inputs = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
    return _batch(sequences, inputs, [row * longest for row in range(len(joined))])


def pack_sequences(sequences: Sequence[TokenSequence]) -> SequenceBatch:
    """Lay all prompts + responses end to end in one row, ``input_ids [1, N]``; `packing` keeps their attention apart.

    The other inputs follow transformers' convention for packed rows: ``position_ids [1, N]`` restart at every sequence;
    ``cu_seq_lens_q`` and ``cu_seq_lens_k``, ``[S + 1]`` int32, are the sequence borders.
    Raises ValueError as `pad_sequences` does.
    """
    joined = _joined(sequences)
    lengths = [len(ids) for ids in joined]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.concatenate(joined).astype(np.int64)[None]),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])[None]),
        "cu_seq_lens_q": torch.from_numpy(borders),
        "cu_seq_lens_k": torch.from_numpy(borders),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return _batch(sequences, inputs, borders[:-1].tolist())


@dataclass(frozen=True)
class Layout:
    """A layout of sequences, and the plan that fills a token budget with it."""

    plan: Plan
    lay_out: Callable[[Sequence[TokenSequence]], SequenceBatch]


PADDED = Layout(plan_padded, pad_sequences)
PACKED = Layout(plan_packed, pack_sequences)


def response_positions(prompt_tokens: int, response_tokens: int) -> np.ndarray:
    """Return the positions of the hidden states that predict the response: one before each of its tokens."""
    return np.arange(prompt_tokens - 1, prompt_tokens + response_tokens - 1)


def _joined(sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
    for row, sequence in enumerate(sequences):
        prompt, response = len(sequence.prompt_ids), len(sequence.response_ids)
        if not prompt or not response:
            raise ValueError(
                f"sequence {row} has {prompt} prompt and {response} response tokens: both need one or more"
            )
    return [np.concatenate([sequence.prompt_ids, sequence.response_ids]) for sequence in sequences]


def _batch(sequences: Sequence[TokenSequence], inputs: dict[str, Any], starts: Sequence[int]) -> SequenceBatch:
    positions = [
        start + response_positions(len(s.prompt_ids), len(s.response_ids))
        for start, s in zip(starts, sequences, strict=True)
    ]
    return SequenceBatch(
        inputs=inputs,
        positions=torch.from_numpy(np.concatenate(positions)),
        response_ids=torch.from_numpy(np.concatenate([s.response_ids for s in sequences]).astype(np.int64)),
        lengths=tuple(len(s.response_ids) for s in sequences),
    )
