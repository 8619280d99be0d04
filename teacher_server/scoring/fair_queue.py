"""Fair order of service: deficit round robin between tenants, and between the runs of a tenant. Pure, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MAX_RUNS = 64
"""Runs of a tenant that wait in separate queues; the runs after them share one. Every turn looks at all of them."""

OTHERS = "*"
"""Queue of the runs above `MAX_RUNS`."""


@dataclass(slots=True, eq=False)
class _Flow(Generic[T]):
    """A run with its `items`, or a tenant (or the root) with its `members`, which take turns.

    In each round every member gets one token of credit. A member whose credit pays for its next item is served.
    """

    credit: int = 0
    loan: int = 0
    """Advance on the credit of a newcomer, for its first item."""
    tokens: int = 0
    """Waiting tokens, of all members."""
    items: OrderedDict[int, tuple[T, int]] = field(default_factory=OrderedDict)
    """Items with their tokens by number, so that one in the middle leaves at once."""
    members: dict[str, _Flow[T]] = field(default_factory=dict)
    lead: int = 0
    """Tokens to serve before the next loan: new names cannot keep overtaking the known ones."""

    def open(self, name: str, tokens: int) -> _Flow[T]:
        """The member called `name`. A new one may get a loan of `tokens`."""
        flow = self.members.get(name)
        if flow is None:
            flow = self.members[name] = _Flow()
            if self.lead <= 0:
                flow.loan, self.lead = tokens, tokens * len(self.members)
        return flow

    def head(self) -> _Flow[T]:
        """The member to serve next. At least one member must have items."""
        waiting = [flow for flow in self.members.values() if flow.tokens]
        head = min(waiting, key=lambda flow: (flow.rounds(), -flow.loan))
        if rounds := head.rounds():
            for flow in self.members.values():
                flow.credit += rounds
        if len(waiting) < len(self.members):
            # Idling saves up no credit, and leaving clears no debt.
            self.members = {name: flow for name, flow in self.members.items() if flow.tokens or flow.credit < 0}
        return head

    def rounds(self) -> int:
        """Number of rounds until the next item is paid for."""
        return max(0, self.cost() - self.credit - self.loan)

    def cost(self) -> int:
        """Tokens of the next item."""
        return next(iter(self.items.values()))[1] if self.items else self.head().cost()

    def serve(self, tokens: int) -> None:
        """Charge an item that leaves."""
        self.credit -= tokens
        self.tokens -= tokens
        self.lead -= tokens
        self.loan = 0


Ticket = tuple[_Flow[Any], _Flow[Any], int]
"""Place of an item: its tenant, its run, its number."""


class FairQueue(Generic[T]):
    """Items by tenant and run. All waiting tenants get equal tokens, and all waiting runs of one tenant.

    A newcomer is next, however long the other queues are, unless another newcomer was just served.
    """

    def __init__(self) -> None:
        self._root: _Flow[T] = _Flow()
        self._numbers = count()

    @property
    def tokens(self) -> int:
        """Waiting tokens of all tenants."""
        return self._root.tokens

    @property
    def waiting_runs(self) -> int:
        """Number of runs, over all tenants, that have items waiting."""
        return sum(bool(run.tokens) for tenant in self._root.members.values() for run in tenant.members.values())

    def waiting_tokens(self, tenant: str, run: str | None = None) -> int:
        """Waiting tokens of a tenant, or of one of its runs."""
        flow = self._root.members.get(tenant)
        if flow is not None and run is not None:
            flow = flow.members.get(run)
        return 0 if flow is None else flow.tokens

    def push(self, tenant: str, run: str, item: T, tokens: int) -> Ticket:
        """Append `item`, which costs `tokens` (at least 1). The ticket is for `discard`."""
        tokens = max(1, tokens)
        owner = self._root.open(tenant, tokens)
        if run not in owner.members and len(owner.members) >= MAX_RUNS:
            run = OTHERS
        queue = owner.open(run, tokens)
        number = next(self._numbers)
        queue.items[number] = (item, tokens)
        for flow in (self._root, owner, queue):
            flow.tokens += tokens
        return owner, queue, number

    def pop(self, fits: Callable[[T], bool] = lambda _: True) -> T | None:
        """Remove and return the next item; None if the queue is empty or the item does not fit."""
        if not self.tokens:
            return None
        owner = self._root.head()
        queue = owner.head()
        number, (item, tokens) = next(iter(queue.items.items()))
        if not fits(item):
            return None
        del queue.items[number]
        for flow in (self._root, owner, queue):
            flow.serve(tokens)
        if not self.tokens:
            self._root = _Flow()  # no tenant waits, so none is owed tokens
        return item

    def charge(self, tenant: str, tokens: int) -> None:
        """Charge a tenant for the contexts of a batch if another tenant waits.

        All runs of the tenant share its contexts: charging the run that asked first would put it behind the others.
        """
        if self.tokens > self.waiting_tokens(tenant):
            self._root.open(tenant, 0).credit -= tokens

    def discard(self, tickets: Iterable[Ticket]) -> None:
        """Remove the items of `tickets` that still wait, at no cost for those behind them."""
        for owner, queue, number in tickets:
            _, tokens = queue.items.pop(number, (None, 0))
            for flow in (self._root, owner, queue):
                flow.tokens -= tokens
