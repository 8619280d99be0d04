"""Layout of a batch of sequences as one packed row of tokens with its attention plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.protocol.schema import Ids
from teacher_server.backends.hf.attention import AttentionPlan, KeyValues, PrefixSpan, causal_blocks


@dataclass(frozen=True, slots=True, eq=False)
class PrefixState:
    """Keys and values of a context, computed once. A child holds only the tokens after its parent.

    ``last_hidden [H]`` is the final hidden state of the last token. It predicts the first response token if the prompt
    is empty.
    """

    parent: PrefixState | None
    own: KeyValues
    own_tokens: int
    total_tokens: int
    last_hidden: Tensor
    nbytes: int
    devices: list[torch.device] = field(default_factory=list)
    """Device of each layer's tensors while they are on the host."""

    def to_host(self) -> None:
        """Move keys and values into the host's memory, from a GPU into pinned memory."""
        self.devices[:] = [keys.device for keys in self.own.keys]
        for tensors in (self.own.keys, self.own.values):
            tensors[:] = [tensor.to("cpu", non_blocking=True) for tensor in tensors]

    def to_device(self) -> None:
        """Move keys and values back."""
        for tensors in (self.own.keys, self.own.values):
            tensors[:] = [
                tensor.to(device, non_blocking=True) for tensor, device in zip(tensors, self.devices, strict=True)
            ]

    def chain(self) -> list[PrefixState]:
        """This state and its parents, the root first."""
        states: list[PrefixState] = []
        state: PrefixState | None = self
        while state is not None:
            states.append(state)
            state = state.parent
        return states[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixedSequence:
    """A cached prefix of the model's path (or None), the prompt and the response."""

    prefix: Any | None
    prompt: Ids
    response: Ids


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """``ids [N]``, ``positions [N]`` and the plan of one forward pass.

    ``rows[i] [T_i]`` are indices of the hidden states that predict sequence ``i``'s response: below ``N`` into the
    packed row, ``N + j`` is the last hidden state of ``prefixes[j]`` (for an empty prompt).
    """

    ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    rows: list[Tensor]
    prefixes: list[PrefixState]


@dataclass
class _PackedRow:
    """Builder of the packed row."""

    ids: list[Ids]
    positions: list[Ids]
    nodes: list[tuple[int, int]]
    length: int = 0

    def append(self, ids: Ids, first_position: int) -> int:
        start = self.length
        if ids.size:
            self.ids.append(ids)
            self.positions.append(np.arange(first_position, first_position + ids.size, dtype=np.uint32))
            self.nodes.append((start, int(ids.size)))
            self.length += int(ids.size)
        return start


def pack_batch(sequences: Sequence[PrefixedSequence]) -> PackedBatch:
    """Lay out `sequences` grouped by prefix, then by prompt; a shared prompt appears once.

    The last response token is left out, because it predicts nothing.
    """
    row = _PackedRow([], [], [])
    prefix_spans: list[PrefixSpan] = []
    predictors: list[tuple[int, list[int]]] = []
    prefixes: dict[int, PrefixState] = {}
    for members in _group(range(len(sequences)), lambda i: id(sequences[i].prefix)):
        prefix = sequences[members[0]].prefix
        begin = row.length
        offset = 0 if prefix is None else prefix.total_tokens
        inner: list[PrefixSpan] = []
        for same in _group(members, lambda i: sequences[i].prompt.tobytes()):
            predictors += _append_prompt(row, inner, [(i, sequences[i]) for i in same], offset)
        if prefix is not None:
            prefixes[id(prefix)] = prefix
            if row.length > begin:
                prefix_spans += [PrefixSpan(begin, row.length, state.own) for state in prefix.chain()]
        prefix_spans += inner
    order = {key: number for number, key in enumerate(prefixes)}
    rows: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(sequences)
    for i, indices in predictors:
        resolved = [index if index >= 0 else row.length + order[id(sequences[i].prefix)] for index in indices]
        rows[i] = torch.tensor(resolved, dtype=torch.long)
    return PackedBatch(
        ids=_tensor(row.ids),
        positions=_tensor(row.positions),
        plan=AttentionPlan(blocks=causal_blocks(row.nodes), prefix_spans=prefix_spans),
        rows=rows,
        prefixes=list(prefixes.values()),
    )


def split_into_passes(sequences: Sequence[PrefixedSequence], tokens: int | None) -> list[list[int]]:
    """Indices of the sequences of each pass; None: one pass. A pass above `tokens` holds sequences of one prompt only.

    Sequences of one prompt are never split, so the prompt is computed once; sequences of one prefix are adjacent.
    """
    if tokens is None:
        return [list(range(len(sequences)))]
    result: list[list[int]] = []
    room = 0
    for same_prefix in _group(range(len(sequences)), lambda i: id(sequences[i].prefix)):
        for same_prompt in _group(same_prefix, lambda i: sequences[i].prompt.tobytes()):
            length = int(sequences[same_prompt[0]].prompt.size)
            length += sum(int(sequences[i].response.size) for i in same_prompt)
            if not result or length > room:
                result.append([])
                room = tokens
            result[-1] += same_prompt
            room -= length
    return result


def _append_prompt(
    row: _PackedRow, prefix_spans: list[PrefixSpan], members: list[tuple[int, PrefixedSequence]], offset: int
) -> list[tuple[int, list[int]]]:
    """Append sequences of one prompt; returns (number, indices of the predicting hidden states; -1: the prefix's)."""
    prompt = members[0][1].prompt
    members = [(i, sequence) for i, sequence in members if sequence.response.size]
    if len(members) < 2 or not prompt.size:
        found = []
        for i, sequence in members:
            start = row.append(np.concatenate([prompt, sequence.response[:-1]]), offset)
            first = start + int(prompt.size) - 1
            indices = list(range(first, first + int(sequence.response.size)))
            if not prompt.size:
                indices[0] = -1
            found.append((i, indices))
        return found
    at = row.append(prompt, offset)
    begin, found = row.length, []
    for i, sequence in members:
        start = row.append(sequence.response[:-1], offset + int(prompt.size))
        found.append((i, [begin - 1, *range(start, start + int(sequence.response.size) - 1)]))
    if row.length > begin:
        prefix_spans.append(PrefixSpan(begin, row.length, slice(at, begin)))
    return found


def _group(numbers: Iterable[int], key: Callable[[int], object]) -> Iterable[list[int]]:
    groups: dict[object, list[int]] = {}
    for number in numbers:
        groups.setdefault(key(number), []).append(number)
    return groups.values()


def _tensor(parts: list[Ids]) -> Tensor:
    whole = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    return torch.from_numpy(whole.astype(np.int64))
