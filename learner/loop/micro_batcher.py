"""Forms micro-batches out of scored rollouts: a group of one per rank, as soon as every rank has a full one."""

from __future__ import annotations

from typing import Generic, TypeVar

from learner.trainer.batch_plan import plan_packed, plan_padded

T = TypeVar("T")


class MicroBatcher(Generic[T]):
    """Collects items as they arrive and deals out groups of `ranks` micro-batches.

    A micro-batch holds at most ``budget_tokens`` tokens (a longer item is a micro-batch by itself): with padding to its
    longest item, or without if the ranks compute rows `packed` end to end. Every rank gets one micro-batch of each
    group, an empty one if there are too few.
    """

    def __init__(self, ranks: int, budget_tokens: int, *, packed: bool = False) -> None:
        self._ranks = ranks
        self._budget = budget_tokens
        self._packed = packed
        self._plan = plan_packed if packed else plan_padded
        self._waiting: list[tuple[int, T]] = []
        self._longest = 0
        self._tokens = 0

    def __len__(self) -> int:
        """Items that wait for a full group."""
        return len(self._waiting)

    def add(self, tokens: int, item: T) -> list[list[list[T]]]:
        """Take an item of `tokens` tokens (prompt + response); returns the groups that are now full, usually none."""
        self._waiting.append((tokens, item))
        self._longest = max(self._longest, tokens)
        self._tokens += tokens
        # A micro-batch is full when one more item of its longest length would exceed the budget.
        filled = self._tokens if self._packed else self._longest * len(self._waiting)
        if filled + self._longest * self._ranks <= self._budget * self._ranks:
            return []
        full = self._cut()
        if self._may_grow(full[-1]):
            full.pop()
        count = len(full) - len(full) % self._ranks
        taken = {index for batch in full[:count] for index in batch}
        groups = self._groups(full[:count])
        self._keep([pair for index, pair in enumerate(self._waiting) if index not in taken])
        return groups

    def flush(self) -> list[list[list[T]]]:
        """Groups of all items that are left, dealt out evenly."""
        batches = self._cut()
        groups = self._groups(batches + [[] for _ in range(-len(batches) % self._ranks)])
        self._keep([])
        return groups

    def _cut(self) -> list[list[int]]:
        """Micro-batches of all waiting items, as indices; only the last may have room for one more."""
        return self._plan([tokens for tokens, _ in self._waiting], self._budget)

    def _may_grow(self, batch: list[int]) -> bool:
        lengths = [self._waiting[index][0] for index in batch]
        longest = max(lengths)
        filled = sum(lengths) if self._packed else longest * len(lengths)
        return filled + longest <= self._budget

    def _groups(self, batches: list[list[int]]) -> list[list[list[T]]]:
        items = [[self._waiting[index][1] for index in batch] for batch in batches]
        return [items[first : first + self._ranks] for first in range(0, len(items), self._ranks)]

    def _keep(self, waiting: list[tuple[int, T]]) -> None:
        self._waiting = waiting
        self._longest = max((tokens for tokens, _ in waiting), default=0)
        self._tokens = sum(tokens for tokens, _ in waiting)
