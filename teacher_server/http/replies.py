"""A repeated request is computed once: the second asker waits for the first one's reply, or gets it from a cache."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ENTRY_BYTES = 1024
"""Counted for each kept reply beside its own bytes: of small ones, names and bookkeeping are most."""

Name = tuple[str, str, str]
"""(tenant, run, request id)."""


class Conflict(ValueError):
    """The same request id came with another body."""


@dataclass(slots=True, eq=False)
class _Entry:
    digest: bytes
    task: asyncio.Task[tuple[bytes, bool]]
    waiters: int = 0


class Replies:
    """Encoded replies by request, in progress and done; the done ones bounded in bytes, least recently used first out.

    A computation is cancelled when nobody waits for it any more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._running: dict[Name, _Entry] = {}
        self._done: OrderedDict[Name, tuple[bytes, bytes]] = OrderedDict()
        self.nbytes = 0

    async def once(
        self,
        name: Name,
        digest: bytes,
        compute: Callable[[], Awaitable[tuple[bytes, bool]]],
        on_repeat: Callable[[], None] = lambda: None,
    ) -> bytes:
        """The reply to `name`; `compute` gives (reply, whether it may be given again).

        `digest` is of the request's body; raises Conflict where `name` came with another one. `on_repeat` is called
        where nothing is computed for this caller.
        """
        if not name[2]:
            return (await compute())[0]
        if (done := self._done.get(name)) is not None:
            self._same(done[0], digest)
            self._done.move_to_end(name)
            on_repeat()
            return done[1]
        entry = self._running.get(name)
        if entry is None:
            entry = _Entry(digest, asyncio.ensure_future(self._compute(name, digest, compute)))
            self._running[name] = entry
        else:
            self._same(entry.digest, digest)
            on_repeat()
        entry.waiters += 1
        try:
            return (await asyncio.shield(entry.task))[0]
        finally:
            entry.waiters -= 1
            if not entry.waiters and not entry.task.done():
                self._running.pop(name, None)
                entry.task.cancel()

    async def _compute(
        self, name: Name, digest: bytes, compute: Callable[[], Awaitable[tuple[bytes, bool]]]
    ) -> tuple[bytes, bool]:
        try:
            reply, keep = await compute()
        finally:
            # Failures are not kept: whoever asks again gets another try. (After a cancellation the name may be
            # another computation's already.)
            entry = self._running.get(name)
            if entry is not None and entry.task is asyncio.current_task():
                del self._running[name]
        if keep and len(reply) + ENTRY_BYTES <= self._max_bytes:
            self._done[name] = (digest, reply)
            self.nbytes += len(reply) + ENTRY_BYTES
            while self.nbytes > self._max_bytes:
                _, (_, oldest) = self._done.popitem(last=False)
                self.nbytes -= len(oldest) + ENTRY_BYTES
        return reply, keep

    @staticmethod
    def _same(known: bytes, digest: bytes) -> None:
        if known != digest:
            raise Conflict("this request id was used for another request: ids must be fresh")
