"""The controller's end of a worker's line: orders go out together, answers come back together, each by itself.

A Ray call costs the controller more than everything else that it does for an answer. So orders that are given at about
the same time share a call, and one call at a time waits at the worker and brings back whatever has ended since. Its
items are objects of their own, which this process owns: they outlive the worker, and nobody loads one for another.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import Any

from common.async_utils import value_of
from rollout_workers.pool.outbox import Order, Outcome

MOST, FEWEST = 64, 8
"""Answers that a reply has room for: twice as many as the last one brought, within these."""

Answer = tuple[Any, Any]
"""(summary, reference to the item)."""


class Line:
    """Orders to one worker and its answers. Used on one event loop."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._tickets = itertools.count()
        self._open: dict[int, asyncio.Future[Answer]] = {}
        self._orders: list[Order] = []
        self._cancelled: list[int] = []
        self._collecting: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def order(self, sample: Any, *, scored: bool) -> Answer:
        """Have the worker make an answer. Raises what its work raised; one of `ACTOR_LOST` where the worker is. To
        cancel the task that waits here gives the answer up.
        """
        order = Order(next(self._tickets), sample, scored)
        future = self._open[order.ticket] = asyncio.get_running_loop().create_future()
        self._orders.append(order)
        self._send_soon()
        try:
            return await future
        except asyncio.CancelledError:
            self._give_up(order.ticket)
            raise

    def close(self) -> None:
        """Wait for nothing any more."""
        for task in (*self._sending, *([self._collecting] if self._collecting else [])):
            task.cancel()

    def _give_up(self, ticket: int) -> None:
        if self._open.pop(ticket, None) is not None:
            self._cancelled.append(ticket)
            self._send_soon()

    def _send_soon(self) -> None:
        """With the next turn of the loop, so that what is ordered in this one goes along."""
        loop = asyncio.get_running_loop()
        if self._collecting is None:
            self._start_collecting()
        elif len(self._orders) + len(self._cancelled) == 1:
            loop.call_soon(self._send)

    def _send(self) -> None:
        """Orders that came while a call waits at the worker."""
        orders, cancelled = self._taken()
        if not orders and not cancelled:
            return  # they went with a call that collects

        async def send() -> None:
            await value_of(self._handle.exchange.remote(orders, cancelled, 0))

        task = asyncio.get_running_loop().create_task(send(), name="send")
        self._sending.add(task)
        task.add_done_callback(partial(self._sent, [order.ticket for order in orders]))

    def _taken(self) -> tuple[list[Order], list[int]]:
        orders, cancelled = self._orders, self._cancelled
        self._orders, self._cancelled = [], []
        return orders, cancelled

    def _start_collecting(self) -> None:
        self._collecting = asyncio.get_running_loop().create_task(self._collect(), name="collect")
        self._collecting.add_done_callback(self._collected)

    async def _collect(self) -> None:
        """Call by call, as long as anything is open."""
        brought = 0
        while self._open or self._cancelled:
            brought = await self._exchange(min(max(2 * brought, FEWEST), MOST, len(self._open)))
            # What ended makes room for orders that wait: two turns, and they go out with the next call.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def _exchange(self, most: int) -> int:
        """One call; how many answers it brought, of at most `most`."""
        reply = self._handle.exchange.options(num_returns=1 + most).remote(*self._taken(), most)
        first, *items = reply if most else [reply]
        outcomes: list[Outcome] = await value_of(first)
        for outcome, item in zip(outcomes, items[: len(outcomes)], strict=True):
            self._settle(outcome, item)
        return len(outcomes)

    def _settle(self, outcome: Outcome, item: Any) -> None:
        future = self._open.pop(outcome.ticket, None)
        if future is None or future.done():
            return  # given up
        if outcome.error is None:
            future.set_result((outcome.summary, item))
        else:
            future.set_exception(outcome.error.as_instanceof_cause())

    # Whoever gave an order waits on a future: whatever happens to a call must reach him.

    def _collected(self, task: asyncio.Task[None]) -> None:
        self._collecting = None
        self._fail(list(self._open), task)
        if self._open and not task.cancelled():  # ordered since it ended
            self._start_collecting()

    def _sent(self, tickets: list[int], task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._fail(tickets, task)

    def _fail(self, tickets: list[int], call: asyncio.Task[None]) -> None:
        error = None if call.cancelled() else call.exception()
        if error is None:
            return
        for ticket in tickets:
            future = self._open.pop(ticket, None)
            if future is not None and not future.done():
                future.set_exception(error)
