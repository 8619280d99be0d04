"""Prompts of rows with their own contexts, rendered when they are read; sizes of prompts; rows to check at a start."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from common.data.rendered_checks import length_faults
from common.data.rendering import Renderer, context_of
from common.data.rows import DataError
from common.protocol.schema import Context, Ids, Prompt
from learner.data.games import FirstTurn
from learner.data.stored_rows import StoredRows

CHECKED_ROWS = 128
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
    """Prompts of training rows, each rendered when it is read; the last `KEPT_PROMPTS` stay.

    Reading one raises DataError, which names the row, for a row that cannot be rendered or exceeds one of `limits`.
    """

    def __init__(
        self, rows: StoredRows, games: Mapping[int, FirstTurn], renderer: Renderer, answer: tuple[str, int]
    ) -> None:
        """`games` are the first turns of the rows that are games, by index. `answer` is the key and the number of the
        tokens that an answer can have.
        """
        self._rows = rows
        self._games = games
        self._renderer = renderer
        self._answer = answer
        self._kept: OrderedDict[int, Prompt] = OrderedDict()
        self.limits: dict[Literal["student", "teacher"], tuple[str, int]] = {}
        """Side -> name and tokens of its longest sequence."""

    def __len__(self) -> int:
        return len(self._rows)

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
        prompt = self.render(index)
        self._check(prompt)
        self._kept[index] = prompt
        if len(self._kept) > KEPT_PROMPTS:
            self._kept.popitem(last=False)
        return prompt

    def render(self, index: int) -> Prompt:
        """Return a row's prompt, of any length, and keep nothing."""
        turn = self._games.get(index) or FirstTurn(self._rows[index])
        return turn.render(self._renderer)

    def _check(self, prompt: Prompt) -> None:
        own = 0 if prompt.own_context is None else len(prompt.own_context.ids)
        tokens = {"student": len(prompt.student_ids), "teacher": own + len(prompt.teacher_ids)}
        for side, limit in self.limits.items():
            for fault in length_faults(
                "data.train: ", side, {prompt.row_id: tokens[side]}, answer=self._answer, limit=limit
            ):
                raise DataError(fault)


def rows_to_check(rows: StoredRows, *, every_row: bool) -> list[int]:
    """Return the indices of the rows to render before a run: all, or `CHECKED_ROWS`, half of them the longest texts and
    half spread evenly.
    """
    if every_row or len(rows) <= CHECKED_ROWS:
        return list(range(len(rows)))
    half = CHECKED_ROWS // 2
    longest = heapq.nlargest(half, range(len(rows)), lambda i: rows.prompt_characters[i] + rows.own_characters[i])
    return sorted({*longest, *spread(len(rows), half)})


def spread(rows: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over `rows`, or all of them if there are fewer."""
    return [rows * number // count for number in range(count)] if rows > count else list(range(rows))
