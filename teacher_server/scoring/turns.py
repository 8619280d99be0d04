"""Work on large requests in threads, off the event loop, one piece at a time for each tenant."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """Runs functions for tenants. Threads share the interpreter, so each tenant has one at a time.

    A tenant that sends a hundred large requests thus slows the event loop no more than one that sends a single one.
    """

    def __init__(self) -> None:
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def run(self, tenant: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``call(*args)``, run in a thread when the tenant's earlier calls have ended.

        A call that has begun runs to its end, and keeps the tenant's turn, also if its caller is cancelled.
        """
        lock = self._locks[tenant]
        await lock.acquire()

        def end(future: asyncio.Future[T]) -> None:
            lock.release()
            if not future.cancelled():
                future.exception()  # a cancelled caller does not ask for it

        running = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
        running.add_done_callback(end)
        return await asyncio.shield(running)
