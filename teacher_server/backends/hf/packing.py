"""A batch of sequences as one packed row of tokens, with the plan of who attends to what. Pure; no model here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.protocol.schema import Ids
from teacher_server.backends.hf.attention import AttentionPlan, Cross, KeyValues, own_blocks


@dataclass(frozen=True, slots=True, eq=False)
class PrefixState:
    """A context's keys and values, computed once. A child holds only what comes after its parent.

    ``last_hidden [H]`` is the final hidden state of the last token: what predicts the first token of an empty prompt.
    """

    parent: PrefixState | None
    own: KeyValues
    own_tokens: int
    total_tokens: int
    last_hidden: Tensor
    nbytes: int

    def chain(self) -> list[PrefixState]:
        """This state and its parents, the root first."""
        states: list[PrefixState] = []
        state: PrefixState | None = self
        while state is not None:
            states.append(state)
            state = state.parent
        return states[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class Sequence_:
    """What is packed: a prefix (or None), the prompt and the response after it."""

    prefix: PrefixState | None
    prompt: Ids
    response: Ids


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """``ids [N]``, ``positions [N]`` and the plan of one forward pass.

    ``rows[i] [T_i]`` are where the hidden states that predict sequence ``i``'s response lie: an index below ``N`` is a
    place of the packed row, ``N + j`` is the last hidden state of ``prefixes[j]`` (an empty prompt).
    """

    ids: Tensor
    positions: Tensor
    plan: AttentionPlan
    rows: list[Tensor]
    prefixes: list[PrefixState]


@dataclass
class _Row:
    """The packed row while it grows."""

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


def pack(sequences: Sequence[Sequence_]) -> Packed:
    """Lay `sequences` out so that those of one prefix, and of one prompt under it, are neighbours.

    A prompt that several sequences share is laid out once. The last response token is left out: nothing is predicted
    from it.
    """
    row = _Row([], [], [])
    crosses: list[Cross] = []
    found: list[tuple[int, list[int]]] = []
    empty: dict[int, PrefixState] = {}
    for members in _group(range(len(sequences)), lambda i: id(sequences[i].prefix)):
        prefix = sequences[members[0]].prefix
        begin = row.length
        offset = 0 if prefix is None else prefix.total_tokens
        inner: list[Cross] = []
        for same in _group(members, lambda i: sequences[i].prompt.tobytes()):
            found += _lay_prompt(row, inner, [(i, sequences[i]) for i in same], offset)
        if prefix is not None:
            empty[id(prefix)] = prefix
            if row.length > begin:
                crosses += [Cross(begin, row.length, state.own) for state in prefix.chain()]
        crosses += inner
    order = {key: number for number, key in enumerate(empty)}
    rows: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(sequences)
    for i, places in found:
        resolved = [place if place >= 0 else row.length + order[id(sequences[i].prefix)] for place in places]
        rows[i] = torch.tensor(resolved, dtype=torch.long)
    return Packed(
        ids=_tensor(row.ids),
        positions=_tensor(row.positions),
        plan=AttentionPlan(blocks=own_blocks(row.nodes), crosses=crosses),
        rows=rows,
        prefixes=list(empty.values()),
    )


def passes(sequences: Sequence[Sequence_], tokens: int | None) -> list[list[int]]:
    """Numbers of the sequences that are packed together: at most `tokens` in a row, None: all in one.

    Neighbours in `pack` stay together, and those that share a prompt always, so that it is computed once.
    """
    if tokens is None:
        return [list(range(len(sequences)))]
    found: list[list[int]] = []
    room = 0
    for under in _group(range(len(sequences)), lambda i: id(sequences[i].prefix)):
        for same in _group(under, lambda i: sequences[i].prompt.tobytes()):
            length = int(sequences[same[0]].prompt.size) + sum(int(sequences[i].response.size) for i in same)
            if not found or length > room:
                found.append([])
                room = tokens
            found[-1] += same
            room -= length
    return found


def _lay_prompt(
    row: _Row, crosses: list[Cross], members: list[tuple[int, Sequence_]], offset: int
) -> list[tuple[int, list[int]]]:
    """Append sequences of one prompt; returns (number, places of the predicting hidden states; -1: the prefix's)."""
    prompt = members[0][1].prompt
    members = [(i, sequence) for i, sequence in members if sequence.response.size]
    if len(members) < 2 or not prompt.size:
        found = []
        for i, sequence in members:
            start = row.append(np.concatenate([prompt, sequence.response[:-1]]), offset)
            first = start + int(prompt.size) - 1
            places = list(range(first, first + int(sequence.response.size)))
            if not prompt.size:
                places[0] = -1
            found.append((i, places))
        return found
    at = row.append(prompt, offset)
    begin, found = row.length, []
    for i, sequence in members:
        start = row.append(sequence.response[:-1], offset + int(prompt.size))
        found.append((i, [begin - 1, *range(start, start + int(sequence.response.size) - 1)]))
    if row.length > begin:
        crosses.append(Cross(begin, row.length, slice(at, begin)))
    return found


def _group(numbers: Iterable[int], key: Callable[[int], object]) -> Iterable[list[int]]:
    groups: dict[object, list[int]] = {}
    for number in numbers:
        groups.setdefault(key(number), []).append(number)
    return groups.values()


def _tensor(parts: list[Ids]) -> Tensor:
    whole = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    return torch.from_numpy(whole.astype(np.int64))
