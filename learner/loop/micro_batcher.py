"""Forms micro-batches out of scored rollouts: a group of one per rank, as soon as every rank has a full one."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class MicroBatcher(Generic[T]):
    """Collects items as they arrive and deals out groups of `ranks` micro-batches.

    A micro-batch holds items of similar length, at most ``budget_tokens`` tokens with padding (a longer item is a
    micro-batch by itself). Every rank gets one micro-batch of each group, an empty one if there are too few.
    """

    def __init__(self, ranks: int, budget_tokens: int) -> None:
        self._ranks = ranks
        self._budget = budget_tokens
        self._waiting: list[tuple[int, T]] = []
        self._longest = 0

    def __len__(self) -> int:
        """Items that wait for a full group."""
        return len(self._waiting)

    def add(self, tokens: int, item: T) -> list[list[list[T]]]:
        """Take an item of `tokens` tokens (prompt + response); returns the groups that are now full, usually none."""
        self._waiting.append((tokens, item))
        self._longest = max(self._longest, tokens)
        # A micro-batch is full when one more item of its longest length would exceed the budget.
        if self._longest * (len(self._waiting) + self._ranks) <= self._budget * self._ranks:
            return []
        full = self._cut()
        if full[-1][0][0] * (len(full[-1]) + 1) <= self._budget:
            full.pop()  # it may still grow
        groups = []
        while len(full) >= self._ranks:
            groups.append([[item for _, item in batch] for batch in full[: self._ranks]])
            taken = sum(len(batch) for batch in full[: self._ranks])
            self._waiting = self._waiting[taken:]
            full = full[self._ranks :]
        self._longest = max((tokens for tokens, _ in self._waiting), default=0)
        return groups

    def flush(self) -> list[list[list[T]]]:
        """Groups of all items that are left, dealt out evenly."""
        batches = [[item for _, item in batch] for batch in self._cut()] if self._waiting else []
        self._waiting, self._longest = [], 0
        missing = -len(batches) % self._ranks
        batches += [[] for _ in range(missing)]
        return [batches[i : i + self._ranks] for i in range(0, len(batches), self._ranks)]

    def _cut(self) -> list[list[tuple[int, T]]]:
        """The waiting items, longest first, cut where the padded size would exceed the budget."""
        self._waiting.sort(key=lambda pair: -pair[0])
        batches: list[list[tuple[int, T]]] = [[]]
        for pair in self._waiting:
            batch = batches[-1]
            if batch and batch[0][0] * (len(batch) + 1) > self._budget:
                batch = []
                batches.append(batch)
            batch.append(pair)
        return batches
