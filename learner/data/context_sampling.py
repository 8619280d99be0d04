"""Rows under the contexts of a pool: which sample has which, and what it looks like to the teacher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from common.data.contexts import Pool, drawn
from common.data.rendering import Renderer
from common.data.rows import DataError
from common.protocol.schema import Prompt
from learner.data.games import Turn

STAND_IN_CHARACTERS = 256
"""Of a context, at least: see `end_of`."""

Kind = tuple[bool, str | None]
"""Rows whose prompts share a context's tokens: raw text or not, the system message of a chat."""


class ContextDraw:
    """Renders rows under contexts of a pool; called with (row's index, sample's id) it gives that sample's prompt.

    What is drawn is a function of the run's seed and the key (`common.data.contexts.drawn`). All contexts that training
    rows can name are in ``renderer.contexts`` from the start, so that a teacher can be given them once.

    A context of 16,384 tokens takes a tokenizer 0.1 s, and a step draws hundreds. So a row is rendered behind the last
    characters of its context, and the prefix of the whole put before it: where a row of its kind, rendered both ways,
    shows that this is the same.
    """

    def __init__(self, pool: Pool, renderer: Renderer, seed: int, turns: Sequence[Turn]) -> None:
        """`renderer` under any context; `turns` are what is trained on. Raises DataError as `Renderer.render`."""
        self._pool = pool
        self._seed = seed
        self._turns = turns
        self._renderers = [renderer.under(one.text) for one in pool]
        apart = replace(renderer, contexts={}, without_shared_prefix=[])
        self._short = [apart.under(end_of(one.text)) for one in pool]
        self._prefixes: dict[tuple[int, Kind], str] = {}
        lengths = [0] * len(pool)
        for kind, turn in _one_of_each_kind(turns):
            for index in range(len(pool)):
                short, whole = turn.render(self._short[index]), turn.render(self._renderers[index])
                shared = 0 if whole.context is None else len(renderer.contexts[whole.context].ids)
                lengths[index] = max(lengths[index], shared + len(whole.teacher_ids))
                if whole.context is not None and np.array_equal(whole.teacher_ids, short.teacher_ids):
                    self._prefixes[index, kind] = whole.context
        self._longest = max(range(len(pool)), key=lengths.__getitem__)
        self._known = frozenset(renderer.contexts)

    def __call__(self, index: int, sample_id: str) -> Prompt:
        """The prompt of a training sample."""
        prompt = self._under(drawn(self._seed, sample_id, len(self._pool)), self._turns[index])
        if prompt.context is not None and prompt.context not in self._known:
            raise DataError(
                f"sample {sample_id}: under context {prompt.context_id!r} of the pool it starts with tokens that the "
                "teacher was not told of when the run began"
            )
        return prompt

    def longest(self, turn: Turn) -> Prompt:
        """A row under the context that takes most tokens: what must fit."""
        return self._under(self._longest, turn)

    def held_out(self, turn: Turn) -> Prompt:
        """A held-out row under the one context that it is evaluated with, whenever it is."""
        return self._under(drawn(self._seed, f"held-out/{turn.row.id}", len(self._pool)), turn)

    def under(self, context_id: str, turn: Turn) -> Prompt:
        """A row under the context of that id."""
        return self._under([one.id for one in self._pool].index(context_id), turn)

    def _under(self, index: int, turn: Turn) -> Prompt:
        prefix = self._prefixes.get((index, _kind(turn)))
        short = None if prefix is None else turn.render(self._short[index])
        if short is None or short.context is None:  # its first token merges with the context's last
            prompt = turn.render(self._renderers[index])
        else:
            prompt = replace(short, context=prefix)
        game = prompt.game and replace(prompt.game, context=self._pool[index].text)
        return replace(prompt, game=game, context_id=self._pool[index].id)


def end_of(text: str) -> str:
    """So much of a context's end that a tokenizer does there what it does at the end of the whole.

    Tokens reach back to a blank between words at most. So the end has one, not counting the blanks that it ends with,
    however many those are.
    """
    words = len(text.rstrip())
    length = STAND_IN_CHARACTERS
    while length < words and re.search(r"\S\s+\S", text[words - length : words]) is None:
        length *= 2
    return text[max(words - length, 0) :]


def _one_of_each_kind(turns: Sequence[Turn]) -> Iterator[tuple[Kind, Turn]]:
    yield from {_kind(turn): turn for turn in reversed(turns)}.items()


def _kind(turn: Turn) -> Kind:
    messages = turn.row.messages or ()
    system = messages[0].content if messages and messages[0].role == "system" else None
    return not messages, system
