"""Rows under the contexts of a pool: which sample has which, and what it looks like to the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from common.chat import Renderer
from common.contexts import Pool, drawn
from common.data import DataError
from common.schema import Prompt
from learner.games import Turn


class ContextDraw:
    """Renders rows under contexts of a pool; called with (row's index, sample's id) it gives that sample's prompt.

    What is drawn is a function of the run's seed and the key (`common.contexts.drawn`). All contexts that training
    rows can name are in ``renderer.contexts`` from the start, so that a teacher can be given them once.
    """

    def __init__(self, pool: Pool, renderer: Renderer, seed: int, turns: Sequence[Turn]) -> None:
        """`renderer` under any context; `turns` are what is trained on. Raises DataError as `Renderer.render`."""
        self._pool = pool
        self._seed = seed
        self._turns = turns
        self._renderers = [renderer.under(one.text) for one in pool]
        self._contexts = renderer.contexts
        lengths = [0] * len(pool)
        for turn in _representatives(turns):
            for index in range(len(pool)):
                prompt = self._under(index, turn)
                shared = 0 if prompt.context is None else len(self._contexts[prompt.context].ids)
                lengths[index] = max(lengths[index], shared + len(prompt.teacher_ids))
        self._longest = max(range(len(pool)), key=lengths.__getitem__)
        self._known = frozenset(self._contexts)

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
        prompt = turn.render(self._renderers[index])
        game = prompt.game and replace(prompt.game, context=self._pool[index].text)
        return replace(prompt, game=game, context_id=self._pool[index].id)


def _representatives(turns: Sequence[Turn]) -> list[Turn]:
    """One of each kind whose prompts share their context's tokens: raw text, and chats by their system message."""

    def kind(turn: Turn) -> tuple[bool, str | None]:
        messages = turn.row.messages or ()
        system = messages[0].content if messages and messages[0].role == "system" else None
        return not messages, system

    return list({kind(turn): turn for turn in reversed(turns)}.values())
