"""A worker's end of its line: orders are begun as they come, what ended waits to be collected.

::

    orders ──► begun at once ──► ended ──► collected: all that ended since the last reply, in one
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.exceptions import RayTaskError

from rollout_workers.pool.failures import EngineLost

REPLY_EVERY_S = 0.01
"""Where answers end faster than this, some share a reply; one that ends by itself never waits. A token takes longer."""


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """An answer to be made, and scored where `scored`. `ticket` is used once in a worker's life."""

    ticket: int
    sample: Any
    scored: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order: what the controller hears of it, or the error that its work raised."""

    ticket: int
    summary: Any = None
    error: RayTaskError | None = None


class Outbox:
    """Works on orders; used on one event loop, with at most one call that collects at a time."""

    def __init__(self, make: Callable[[Order], Coroutine[Any, Any, tuple[Any, Any]]]) -> None:
        """`make` does an order: (summary, item)."""
        self._make = make
        self._tasks: dict[int, asyncio.Task[tuple[Any, Any]]] = {}
        self._ended: dict[int, tuple[Outcome, Any]] = {}
        self._changed = asyncio.Event()
        self._replied = float("-inf")
        self._lost: EngineLost | None = None

    async def exchange(self, orders: Sequence[Order], cancelled: Sequence[int], most: int) -> list[Any]:
        """Begin `orders` and give up the tickets in `cancelled`. With `most` above 0 also wait for what ends, and
        return [outcomes, item of each, None up to `most`]; call it with ``num_returns`` of one more. At 0: nothing.

        Raises EngineLost for the work that met it.
        """
        for order in orders:
            task = self._tasks[order.ticket] = asyncio.get_running_loop().create_task(self._make(order))
            task.add_done_callback(partial(self._end, order.ticket))
        for ticket in cancelled:
            self._ended.pop(ticket, None)
            if (given_up := self._tasks.pop(ticket, None)) is not None:
                given_up.cancel()
        if not most:
            return []
        await self._some_ended(most)
        self._replied = asyncio.get_running_loop().time()
        tickets = list(self._ended)[:most]
        taken = [self._ended.pop(ticket) for ticket in tickets]
        return [[outcome for outcome, _ in taken], *(item for _, item in taken), *[None] * (most - len(taken))]

    async def _some_ended(self, most: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._ended:
                await self._change()
            early_s = self._replied + REPLY_EVERY_S - loop.time()
            if early_s <= 0 or len(self._ended) >= most:
                return
            with suppress(TimeoutError):  # then looked at again: what had ended may be cancelled by now
                async with asyncio.timeout(early_s):
                    await self._change()

    async def _change(self) -> None:
        if self._lost is None:
            self._changed.clear()
            await self._changed.wait()
        if self._lost is not None:
            raise self._lost

    def _end(self, ticket: int, task: asyncio.Task[tuple[Any, Any]]) -> None:
        if self._tasks.pop(ticket, None) is None or task.cancelled():
            return  # given up
        error = task.exception()
        if isinstance(error, EngineLost):
            self._lost = error
        elif error is None:
            summary, item = task.result()
            self._ended[ticket] = (Outcome(ticket, summary), item)
        else:
            trace = "".join(traceback.format_exception(error))
            self._ended[ticket] = (Outcome(ticket, error=RayTaskError("exchange", trace, error)), None)
        self._changed.set()
