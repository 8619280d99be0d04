"""Whose turn it is: fair by tokens between tenants, and between the runs of a tenant. Pure; no clock, no threads."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Account(Generic[T]):
    """Of a tenant (then it has `members`, its runs) or of a run (then it has `items`, each with its tokens)."""

    finish: float = -math.inf
    """Tokens it was given, from the level on at which it was opened."""
    turn: int = 0
    """Which of its owner's `turns` was its last, or was when it was opened; -1: it was let ahead."""
    tokens: int = 0
    """That wait."""
    level: float = 0.0
    """Of its members that wait: where a newcomer begins."""
    ahead_until: float = 0.0
    """Level before which no other newcomer is let ahead."""
    turns: int = 0
    """Given to its members."""
    members: dict[str, _Account[T]] = field(default_factory=dict)
    items: deque[tuple[T, int]] = field(default_factory=deque)

    def member(self, name: str, tokens: int) -> _Account[T]:
        """The member's account, opened at the level of those who wait: idling saves nothing up.

        One of those who open it, and none again before the level has risen by as much, begins its first item's `tokens`
        below: it is next, and even with the others then.
        """
        account = self.members.setdefault(name, _Account())
        if not account.tokens:
            waiting = [other.finish for other in self.members.values() if other.tokens]
            self.level = max(self.level, min(waiting, default=0.0))
            # Above all who wait the level is only because others came and went.
            start = min(self.level, max(waiting, default=math.inf))
            account.turn = self.turns
            if waiting and self.level >= self.ahead_until and start - tokens > account.finish:
                start, self.ahead_until, account.turn = start - tokens, self.level + tokens, -1
            account.finish = max(account.finish, start)
        return account

    def next(self) -> tuple[str, _Account[T]]:
        """Of the members that wait, the one served least; of several, the one that has waited longest for its turn."""
        waiting = ((name, account) for name, account in self.members.items() if account.tokens)
        return min(waiting, key=lambda entry: (entry[1].finish, entry[1].turn))

    def serve(self, name: str, account: _Account[T], tokens: int) -> None:
        """Charge a member whose turn it was; forget who is idle and owes nothing, so that names do not pile up."""
        waiting = sum(1 for other in self.members.values() if other.tokens or other is account)
        # What each would have got by now of a server that serves all at once: it rises whoever is new, so a stream of
        # new names cannot keep overtaking those who are there.
        self.level += tokens / waiting
        account.finish += tokens
        self.turns += 1
        account.turn = self.turns
        if not self.tokens:  # nobody waits: nobody was kept waiting for another, all accounts are even
            self.members.clear()
            self.level = self.ahead_until = 0.0
        for other in [n for n, a in self.members.items() if not a.tokens and a.finish <= self.level and n != name]:
            del self.members[other]


class FairQueue(Generic[T]):
    """Weighted fair queueing over two levels, all weights equal.

    `pop` takes from the tenant that was served the fewest tokens, and of its runs from the one served the fewest. Who
    was idle starts at the level of those who are not: a newcomer is next, once, however long the others' queues are.
    """

    def __init__(self) -> None:
        self._root: _Account[T] = _Account()
        self._count = 0

    @property
    def tokens(self) -> int:
        """Tokens that wait, of all tenants."""
        return self._root.tokens

    @property
    def waiting_runs(self) -> int:
        """Runs, of all tenants, that have items waiting."""
        return sum(1 for owner in self._root.members.values() for run in owner.members.values() if run.tokens)

    def push(self, tenant: str, run: str, item: T, tokens: int) -> None:
        """Append `item`, which costs `tokens` (at least 1)."""
        tokens = max(1, tokens)
        owner = self._root.member(tenant, tokens)
        queue = owner.member(run, tokens)
        queue.items.append((item, tokens))
        for account in (self._root, owner, queue):
            account.tokens += tokens
        self._count += 1

    def peek_tokens(self) -> int:
        """Tokens of what `pop` would return."""
        return self._root.next()[1].next()[1].items[0][1]

    def pop(self) -> T:
        """The next item; IndexError where nothing waits."""
        if not self._count:
            raise IndexError("nothing waits")
        tenant, owner = self._root.next()
        run, queue = owner.next()
        item, tokens = queue.items.popleft()
        for account in (self._root, owner, queue):
            account.tokens -= tokens
        self._root.serve(tenant, owner, tokens)
        owner.serve(run, queue, tokens)
        self._count -= 1
        return item

    def charge(self, tenant: str, run: str, tokens: int) -> None:
        """Count tokens that were computed for a run beside its items (a context's first computation)."""
        owner = self._root.members.get(tenant)
        if owner is not None:
            owner.finish += tokens
            if run in owner.members:
                owner.members[run].finish += tokens

    def discard(self, tenant: str, run: str, items: list[T]) -> None:
        """Take out those of `items` that still wait."""
        owner = self._root.members.get(tenant)
        queue = owner.members.get(run) if owner else None
        if owner is None or queue is None:
            return
        dead = {id(item) for item in items}
        kept = deque(entry for entry in queue.items if id(entry[0]) not in dead)
        gone = sum(tokens for _, tokens in queue.items) - sum(tokens for _, tokens in kept)
        self._count -= len(queue.items) - len(kept)
        queue.items = kept
        for account in (self._root, owner, queue):
            account.tokens -= gone

    def waiting_tokens(self, tenant: str, run: str | None = None) -> int:
        """Tokens that wait for a tenant, or for one of its runs."""
        account = self._root.members.get(tenant)
        if account is not None and run is not None:
            account = account.members.get(run)
        return 0 if account is None else account.tokens

    def __iter__(self) -> Iterator[T]:
        for owner in self._root.members.values():
            for queue in owner.members.values():
                for item, _ in queue.items:
                    yield item

    def __len__(self) -> int:
        return self._count
