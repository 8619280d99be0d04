"""The fast path: packed forward passes whose sequences read a cached context's keys and values in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

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

    def prefill(self, ids: Ids, parent: PrefixState | None) -> PrefixState:
        """Keys and values of `ids` after `parent`, computed in chunks of `prefill_tokens`.

        Raises UnsupportedAttention if a layer computed its attention in another way.
        """
        chunks: list[PrefixState] = []
        last = parent
        for start in range(0, ids.size, self._prefill_tokens):
            last = self._prefill_chunk(ids[start : start + self._prefill_tokens], last)
            chunks.append(last)
        assert last is not None
        if not self._token_bytes:
            self._token_bytes = sum(t.nbytes for t in (*last.own.keys, *last.own.values)) // last.own_tokens
            self._hidden_bytes = last.last_hidden.nbytes
        if len(chunks) == 1:
            return chunks[0]
        layers = range(len(last.own.keys))
        own = KeyValues(
            keys=[torch.cat([chunk.own.keys[layer] for chunk in chunks], 1) for layer in layers],
            values=[torch.cat([chunk.own.values[layer] for chunk in chunks], 1) for layer in layers],
        )
        return _state(parent, own, int(ids.size), last.last_hidden)

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in all layers, and of the last hidden state."""
        return tokens * self._token_bytes + self._hidden_bytes

    def passes(self, sequences: Sequence[PrefixedSequence]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield, pass by pass, the indices of its sequences and their hidden states ``[T, d]``."""
        for indices in split_into_passes(sequences, CPU_PASS_TOKENS if self._model.device.type == "cpu" else None):
            packed = pack_batch([sequences[i] for i in indices])
            hidden = self._hidden(packed)
            yield indices, [hidden[rows] for rows in packed.rows]

    def _prefill_chunk(self, ids: Ids, parent: PrefixState | None) -> PrefixState:
        packed = pack_batch([PrefixedSequence(parent, ids, as_ids([0]))])
        record: dict[int, tuple[Tensor, Tensor]] = {}
        plan = AttentionPlan(packed.plan.blocks, packed.plan.prefix_spans, record)
        hidden = self._forward(packed.ids, packed.positions, plan)
        layers = range(self._layers)
        missing = [layer for layer in layers if layer not in record]
        if missing:
            raise UnsupportedAttention(f"layers {missing} compute attention outside transformers' interface")
        own = KeyValues([record[layer][0] for layer in layers], [record[layer][1] for layer in layers])
        return _state(parent, own, int(ids.size), hidden[-1].clone())

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


def _state(parent: PrefixState | None, own: KeyValues, tokens: int, last_hidden: Tensor) -> PrefixState:
    return PrefixState(
        parent=parent,
        own=own,
        own_tokens=tokens,
        total_tokens=tokens + (0 if parent is None else parent.total_tokens),
        last_hidden=last_hidden,
        nbytes=sum(tensor.nbytes for tensor in (*own.keys, *own.values)) + last_hidden.nbytes,
    )
