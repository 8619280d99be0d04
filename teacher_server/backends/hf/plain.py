"""Plain paths, for models that the fast path does not fit: transformers' own cache, or full forward passes.

Both run the model as it is, with its own attention, over rows padded on the right.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from common.protocol.schema import ForwardPathName, Ids, as_ids
from teacher_server.backends.hf.packing import PrefixedSequence

PASS_TOKENS = 8192
"""Tokens of a forward pass, padding included; a longer sequence is a pass alone."""
CPU_PASS_TOKENS = 512
COPY_BYTES = 1024**3
"""Upper bound for the copies of a context's cache in one pass; a larger cache is copied for one sequence at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class PlainPrefix:
    """A context with its parents: all ids and, on the cache path, the model's state after them."""

    ids: Ids
    nbytes: int
    cache: Any = None
    last_hidden: Any = None

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole prefix."""
        return int(self.ids.size)

    def to_host(self) -> None:
        """Move the cache into the host's memory."""
        for layer in [] if self.cache is None else self.cache.layers:
            layer.offload()

    def to_device(self) -> None:
        """Move the cache back."""
        for layer in [] if self.cache is None else self.cache.layers:
            layer.prefetch()


class FullPath:
    """Computes the whole sequence, context included, for every answer."""

    name: ForwardPathName = "full"
    cost = "every answer computes its context again"

    def __init__(self, model: Any, *, alone: bool = False) -> None:
        """`alone` runs one sequence a pass, for models whose rows depend on each other."""
        self._model = model
        self._decoder = model.get_decoder()
        self._pass_tokens = 1 if alone else CPU_PASS_TOKENS if model.device.type == "cpu" else PASS_TOKENS

    def prefill(self, parts: Sequence[Ids], parent: PlainPrefix | None) -> list[PlainPrefix]:
        """States of the prefixes ``parent + parts[0]``, ``parent + parts[0] + parts[1]``, ..."""
        states: list[PlainPrefix] = []
        for part in parts:
            parent = self._extend(part, parent)
            states.append(parent)
        return states

    def _extend(self, ids: Ids, parent: PlainPrefix | None) -> PlainPrefix:
        """Keep the ids."""
        whole = ids if parent is None else np.concatenate([parent.ids, ids])
        return PlainPrefix(whole, whole.nbytes)

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of the ids."""
        return tokens * as_ids([0]).nbytes

    def passes(self, sequences: Sequence[PrefixedSequence]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield, pass by pass, the indices of its sequences and their hidden states ``[T, d]``."""
        rows = [_own(s) if s.prefix is None else np.concatenate([s.prefix.ids, _own(s)]) for s in sequences]
        for indices in _plan([len(row) for row in rows], self._pass_tokens):
            hidden = self._run([rows[i] for i in indices])
            yield (
                indices,
                [hidden[n, len(rows[i]) - sequences[i].response.size : len(rows[i])] for n, i in enumerate(indices)],
            )

    def _run(self, rows: Sequence[Ids], cache: Any = None, offset: int = 0) -> Tensor:
        """Final hidden states ``[b, L, d]`` of `rows`, padded on the right, after `offset` tokens in `cache`."""
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        if not longest:
            return torch.empty(len(rows), 0, 0)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.ones(len(rows), offset + longest, dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask[n, offset + len(row) :] = 0
        device = self._model.device
        padding = {} if min(lengths) == longest else {"attention_mask": mask.to(device)}
        state = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        return self._decoder(input_ids=ids.to(device), **padding, **state).last_hidden_state


class CachePath(FullPath):
    """Computes a context once, into transformers' own cache, and copies the cache for every answer.

    The cache is what the model keeps: keys and values, those in a window, or the state of a linear layer.
    """

    name: ForwardPathName = "cache"
    cost = "a context is computed once; every answer copies its cache"

    def __init__(self, model: Any, prefill_tokens: int) -> None:
        """A prefill pass computes at most `prefill_tokens` tokens."""
        super().__init__(model)
        self._prefill_tokens = prefill_tokens
        self._layers: list[_LayerBytes] = []

    def _extend(self, ids: Ids, parent: PlainPrefix | None) -> PlainPrefix:
        """Run `ids` after a copy of the parent's cache."""
        config = self._model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config) if parent is None else copy.deepcopy(parent.cache)
        offset = 0 if parent is None else parent.total_tokens
        for start in range(0, ids.size, self._prefill_tokens):
            hidden = self._run([ids[start : start + self._prefill_tokens]], cache, offset + start)[0, -1].clone()
        whole = ids if parent is None else np.concatenate([parent.ids, ids])
        nbytes = sum(t.nbytes for layer in cache.layers for t in _tensors(layer)) + hidden.nbytes + whole.nbytes
        return PlainPrefix(whole, nbytes, cache, hidden)

    def measure(self, ids: Ids) -> None:
        """Learn the size of a cache from prefixes of two lengths."""
        short, long = len(ids) // 2, len(ids)
        caches = [self._extend(ids[:n], None).cache for n in (short, long)]
        self._layers = []
        for few, many in zip(*(cache.layers for cache in caches), strict=True):
            small, large = (sum(t.nbytes for t in _tensors(layer)) for layer in (few, many))
            each = -(-(large - small) // (long - short))
            self._layers.append(_LayerBytes(small - each * short, each, getattr(few, "sliding_window", None)))

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of the cache of `tokens` tokens without parents."""
        width = self._model.get_output_embeddings().weight.shape[1] * self._model.dtype.itemsize
        return sum(layer.of(tokens) for layer in self._layers) + width + super().prefix_bytes(tokens)

    def passes(self, sequences: Sequence[PrefixedSequence]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yield, pass by pass, the indices of its sequences and their hidden states ``[T, d]``.

        A pass has one prefix.
        """
        groups: dict[int, list[int]] = {}
        for i, sequence in enumerate(sequences):
            groups.setdefault(id(sequence.prefix), []).append(i)
        for members in groups.values():
            prefix = sequences[members[0]].prefix
            own = {i: _own(sequences[i]) for i in members}
            limit = None if prefix is None else max(1, COPY_BYTES // max(1, prefix.nbytes))
            for chosen in _plan([len(own[i]) for i in members], self._pass_tokens, limit):
                indices = [members[n] for n in chosen]
                yield indices, self._pass([sequences[i] for i in indices], [own[i] for i in indices], prefix)

    def _pass(
        self, sequences: Sequence[PrefixedSequence], rows: Sequence[Ids], prefix: PlainPrefix | None
    ) -> list[Tensor]:
        if prefix is None:
            hidden = self._run(rows)
        else:
            cache = copy.deepcopy(prefix.cache)
            # Selecting row 0 for every sequence repeats the state of each kind of layer.
            cache.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=self._model.device))
            hidden = self._run(rows, cache, prefix.total_tokens)
        found = []
        for n, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
            states = hidden[n, : len(row)]
            if not sequence.prompt.size and prefix is not None:
                last = prefix.last_hidden
                states = torch.cat([last[None], states.reshape(-1, last.shape[-1])])
            found.append(states[len(states) - sequence.response.size :])
        return found


@dataclass(frozen=True, slots=True)
class _LayerBytes:
    """Size of a layer's cache: `fixed` bytes and `each` per token, at most `window` tokens."""

    fixed: int
    each: int
    window: int | None

    def of(self, tokens: int) -> int:
        return self.fixed + self.each * (tokens if self.window is None else min(tokens, self.window))


def _tensors(layer: Any) -> Iterator[Tensor]:
    """Tensors of a cache layer, those in its lists and dictionaries included."""
    for value in vars(layer).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (part for part in parts if isinstance(part, Tensor))


def _own(sequence: PrefixedSequence) -> Ids:
    """Prompt and response; the last response token is left out, because it predicts nothing."""
    return np.concatenate([sequence.prompt, sequence.response[:-1]])


def _plan(lengths: Sequence[int], budget: int, limit: int | None = None) -> list[list[int]]:
    """Split indices, longest first, into passes of at most `budget` tokens with padding and `limit` sequences."""
    passes: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = not passes or lengths[passes[-1][0]] * (len(passes[-1]) + 1) > budget or len(passes[-1]) == limit
        if full:
            passes.append([])
        passes[-1].append(index)
    return passes
