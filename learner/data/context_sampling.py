"""Sampling of contexts from a pool, and rows rendered with the sampled context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.data.contexts import Pool, context_index
from common.data.rendering import Renderer
from common.data.rows import DataError
from common.protocol.schema import Prompt
from learner.data.games import FirstTurn

STAND_IN_CHARACTERS = 256
"""Minimum characters of a context's end, see `end_of`."""

Kind = tuple[bool, str | None]
"""Rows of one kind share a context's tokens: (raw text or chat, system message of the chat)."""


class ContextSampler:
    """Renders rows with contexts of a pool; a call with (row index, sample id) returns that sample's prompt.

    The context is a function of the run's seed and the sample id (`common.data.contexts.context_index`). Construction
    fills ``renderer.contexts`` with every context that a training row can name, so the teacher gets them once.

    Tokenizing a context of 16,384 tokens takes 0.1 s, and a step samples hundreds. So a row is rendered with only the
    end of its context, and then gets the prefix of the whole context. This needs equal teacher tokens after the prefix,
    which the constructor checks once for each kind of row and context.
    """

    def __init__(self, pool: Pool, renderer: Renderer, seed: int, turns: Sequence[FirstTurn]) -> None:
        """`renderer` may have any context; `turns` are the training rows. Raises DataError as `Renderer.render`."""
        self._pool = pool
        self._seed = seed
        self._turns = turns
        self._renderers = [renderer.with_context(entry.text) for entry in pool]
        separate = replace(renderer, contexts={}, without_shared_prefix=[])
        self._short_renderers = [separate.with_context(end_of(entry.text)) for entry in pool]
        self._prefixes: dict[tuple[int, Kind], str] = {}
        lengths = [0] * len(pool)
        for kind, turn in {_kind(turn): turn for turn in reversed(turns)}.items():
            for index in range(len(pool)):
                short, whole = turn.render(self._short_renderers[index]), turn.render(self._renderers[index])
                shared = 0 if whole.context is None else len(renderer.contexts[whole.context].ids)
                lengths[index] = max(lengths[index], shared + len(whole.teacher_ids))
                if whole.context is not None and np.array_equal(whole.teacher_ids, short.teacher_ids):
                    self._prefixes[index, kind] = whole.context
        self._longest = max(range(len(pool)), key=lengths.__getitem__)
        self._known = frozenset(renderer.contexts)

    def __call__(self, index: int, sample_id: str) -> Prompt:
        """Prompt of a training sample. Raises DataError for a context that the teacher did not get at the start."""
        prompt = self._render(context_index(self._seed, sample_id, len(self._pool)), self._turns[index])
        if prompt.context is not None and prompt.context not in self._known:
            raise DataError(
                f"sample {sample_id}: with context {prompt.context_id!r} of the pool it starts with tokens that the "
                "teacher did not get when the run began"
            )
        return prompt

    def with_longest_context(self, turn: FirstTurn) -> Prompt:
        """The row with the context of most tokens, for length checks."""
        return self._render(self._longest, turn)

    def held_out(self, turn: FirstTurn) -> Prompt:
        """A held-out row with its context, which is the same in every evaluation."""
        return self._render(context_index(self._seed, f"held-out/{turn.row.id}", len(self._pool)), turn)

    def with_context(self, context_id: str, turn: FirstTurn) -> Prompt:
        """The row with the context of that id."""
        return self._render([entry.id for entry in self._pool].index(context_id), turn)

    def _render(self, index: int, turn: FirstTurn) -> Prompt:
        prefix = self._prefixes.get((index, _kind(turn)))
        short = None if prefix is None else turn.render(self._short_renderers[index])
        if short is None or short.context is None:  # the row's first token merges with the context's last
            prompt = turn.render(self._renderers[index])
        else:
            prompt = replace(short, context=prefix)
        game = prompt.game and replace(prompt.game, context=self._pool[index].text)
        return replace(prompt, game=game, context_id=self._pool[index].id)


def end_of(text: str) -> str:
    """The end of a context, long enough that its last tokens equal those of the whole text.

    A token reaches back to a blank between words at most. So the end holds one such blank, trailing blanks excluded.
    """
    words = len(text.rstrip())
    length = STAND_IN_CHARACTERS
    while length < words and re.search(r"\S\s+\S", text[words - length : words]) is None:
        length *= 2
    return text[max(words - length, 0) :]


def _kind(turn: FirstTurn) -> Kind:
    messages = turn.row.messages or ()
    system = messages[0].content if messages and messages[0].role == "system" else None
    return not messages, system
