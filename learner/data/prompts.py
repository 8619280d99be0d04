"""Prompts of rows with their own contexts, rendered when they are read; sizes of prompts; rows to check at a start."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from common.data.rendering import Renderer, context_of
from common.data.rows import Row
from common.protocol.schema import Context, Ids, Prompt
from learner.data.games import FirstTurn

CHECKED_ROWS = 512
"""Rows with their own contexts that a run renders before it starts. The dry run renders all."""
KEPT_PROMPTS = 1024
"""Rendered prompts that stay in memory."""


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """Sizes of one rendered row: prompt tokens, the teacher's with the context; first and largest id of each side (the
    teacher's largest without a context that many rows share).
    """

    row_id: str
    teacher: str
    """Name of the teacher that scores the row."""
    student_tokens: int
    teacher_tokens: int
    student_first_id: int
    teacher_first_id: int
    student_max_id: int
    teacher_max_id: int
    game: bool
    own_tokens: int | None
    """Tokens of the row's own context; None without one."""


def facts_of(prompt: Prompt, contexts: Mapping[str, Context]) -> PromptFacts:
    """Measure one prompt."""
    context = context_of(prompt, contexts)
    parts = [prompt.teacher_ids] if context is None else [context.ids, prompt.teacher_ids]
    shared = None if context is None or prompt.own_context is not None else context.ids
    return PromptFacts(
        prompt.row_id,
        prompt.teacher or "default",
        len(prompt.student_ids),
        sum(map(len, parts)),
        _first(prompt.student_ids),
        _first(parts[0]),
        _largest(prompt.student_ids),
        max(_largest(part) for part in parts if part is not shared),
        prompt.game is not None,
        None if prompt.own_context is None else len(prompt.own_context.ids),
    )


def _first(ids: Ids) -> int:
    return int(ids[0]) if ids.size else -1


def _largest(ids: Ids) -> int:
    return int(ids.max()) if ids.size else 0


class LazyPrompts(Sequence[Prompt]):
    """Prompts of rows, each rendered when it is read; the last `KEPT_PROMPTS` stay.

    Reading one raises DataError for a row that cannot be rendered.
    """

    def __init__(self, turns: Sequence[FirstTurn], renderer: Renderer) -> None:
        self._turns = turns
        self._renderer = renderer
        self._kept: OrderedDict[int, Prompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        prompt = self._kept[index] = self._turns[index].render(self._renderer)
        if len(self._kept) > KEPT_PROMPTS:
            self._kept.popitem(last=False)
        return prompt


def rows_to_check(rows: Sequence[Row], *, every_row: bool) -> list[int]:
    """Return the indices of the rows to render before a run: all, or `CHECKED_ROWS`, half of them the longest texts and
    half spread evenly.
    """
    if every_row or len(rows) <= CHECKED_ROWS:
        return list(range(len(rows)))
    half = CHECKED_ROWS // 2
    longest = sorted(range(len(rows)), key=lambda index: -_characters(rows[index]))[:half]
    return sorted({*longest, *(len(rows) * number // half for number in range(half))})


def _characters(row: Row) -> int:
    messages = (*(row.messages or ()), *(row.teacher_messages or ()))
    return len(row.prompt or "") + len(row.context or "") + sum(len(message.content) for message in messages)
