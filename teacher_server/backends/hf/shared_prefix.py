"""The fast path: packed forward passes whose sequences read a cached context's keys and values in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from common.protocol.schema import ForwardPathName, Ids, as_ids
from teacher_server.backends.hf.attention import (
    ATTENTION_NAME,
    AttentionPlan,
    KeyValues,
    UnsupportedAttention,
    shared_prefix_attention,
)
from teacher_server.backends.hf.packing import PackedBatch, PrefixedSequence, PrefixState, pack_batch, split_into_passes

AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)

CPU_PASS_TOKENS = 512
"""Tokens of a forward pass on CPU. More tokens are not faster, and their activations take memory and exceed caches."""


class SharedPrefixPath:
    """Needs full causal attention in every layer, through transformers' attention interface."""

    name: ForwardPathName = "shared_prefix"
    cost = "a context's keys and values are computed once and read in place"

    def __init__(self, model: Any, prefill_tokens: int) -> None:
        """Switch `model` to `shared_prefix_attention`; a prefill pass computes at most `prefill_tokens` tokens."""
        self._model = model
        self._decoder = model.get_decoder()
        self._prefill_tokens = prefill_tokens
        self._layers = int(model.config.get_text_config().num_hidden_layers)
        self._token_bytes = self._hidden_bytes = 0
        model.set_attn_implementation(ATTENTION_NAME)

    def prefill(self, parts: Sequence[Ids], parent: PrefixState | None) -> list[PrefixState]:
        """Keys and values of every part after `parent` and the parts before it, in chunks of `prefill_tokens`.

        Raises UnsupportedAttention if a layer computed its attention in another way.
        """
        ids = np.concatenate(parts)
        sizes = [int(part.size) for part in parts]
        ends = np.cumsum(sizes)
        chunks: list[KeyValues] = []
        last_hidden: list[Tensor] = []
        last = parent
        for start in range(0, ids.size, self._prefill_tokens):
            chunk = ids[start : start + self._prefill_tokens]
            own, hidden = self._prefill_chunk(chunk, last)
            last = _state(last, own, int(chunk.size), hidden[-1].clone())
            chunks.append(own)
            last_hidden += [hidden[end - 1 - start].clone() for end in ends if start < end <= start + chunk.size]
        if not self._token_bytes:
            self._token_bytes = sum(t.nbytes for t in (*own.keys, *own.values)) // int(chunk.size)
            self._hidden_bytes = last_hidden[-1].nbytes
        states: list[PrefixState] = []
        for own, size, hidden in zip(_split(chunks, sizes), sizes, last_hidden, strict=True):
            parent = _state(parent, own, size, hidden)
            states.append(parent)
        return states

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in all layers, and of the last hidden state."""
        return tokens * self._token_bytes + self._hidden_bytes

    def passes(self, sequences: Sequence[PrefixedSequence]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield, pass by pass, the indices of its sequences and their hidden states ``[T, d]``."""
        for indices in split_into_passes(sequences, CPU_PASS_TOKENS if self._model.device.type == "cpu" else None):
            packed = pack_batch([sequences[i] for i in indices])
            hidden = self._hidden(packed)
            yield indices, [hidden[rows] for rows in packed.rows]

    def _prefill_chunk(self, ids: Ids, parent: PrefixState | None) -> tuple[KeyValues, Tensor]:
        """Keys and values of `ids` after `parent`, and their final hidden states ``[N, d]``."""
        packed = pack_batch([PrefixedSequence(parent, ids, as_ids([0]))])
        record: dict[int, tuple[Tensor, Tensor]] = {}
        plan = AttentionPlan(packed.plan.blocks, packed.plan.prefix_spans, record)
        hidden = self._forward(packed.ids, packed.positions, plan)
        layers = range(self._layers)
        missing = [layer for layer in layers if layer not in record]
        if missing:
            raise UnsupportedAttention(f"layers {missing} compute attention outside transformers' interface")
        return KeyValues([record[layer][0] for layer in layers], [record[layer][1] for layer in layers]), hidden

    def _hidden(self, packed: PackedBatch) -> Tensor:
        """Final hidden states ``[N + prefixes, d]`` of the packed tokens, then of the prefixes' last tokens."""
        parts = [prefix.last_hidden[None] for prefix in packed.prefixes]
        if packed.ids.numel():
            parts.insert(0, self._forward(packed.ids, packed.positions, packed.plan))
        if not parts:
            width = self._model.get_output_embeddings().weight.shape[1]
            return torch.empty((0, width), dtype=self._model.dtype)
        return torch.cat(parts)

    def _forward(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        device = self._model.device
        output = self._decoder(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            attention_plan=plan,
        )
        return output.last_hidden_state[0]


def _split(chunks: Sequence[KeyValues], sizes: Sequence[int]) -> list[KeyValues]:
    """Keys and values of consecutive `chunks`, cut into parts of `sizes` tokens. Parts share no memory."""
    if len(chunks) == len(sizes) == 1:
        return list(chunks)

    def cut(layers: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """``[part][layer]`` of ``[chunk][layer]``."""
        whole = [torch.cat(list(tensors), 1).split(list(sizes), 1) for tensors in zip(*layers, strict=True)]
        return [[layer[part].clone() for layer in whole] for part in range(len(sizes))]

    keys, values = cut([chunk.keys for chunk in chunks]), cut([chunk.values for chunk in chunks])
    return [KeyValues(*pair) for pair in zip(keys, values, strict=True)]


def _state(parent: PrefixState | None, own: KeyValues, tokens: int, last_hidden: Tensor) -> PrefixState:
    return PrefixState(
        parent=parent,
        own=own,
        own_tokens=tokens,
        total_tokens=tokens + (0 if parent is None else parent.total_tokens),
        last_hidden=last_hidden,
        nbytes=sum(tensor.nbytes for tensor in (*own.keys, *own.values)) + last_hidden.nbytes,
    )
