"""Replies of repeated requests: a request is computed once, its copies wait for the reply or get it from a cache."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ENTRY_BYTES = 1024
"""Overhead counted for each kept reply: a small reply takes less memory than its name and bookkeeping."""

Name = tuple[str, str, str]
"""(tenant, run, request id)."""


class Conflict(ValueError):
    """The request id was used with another body."""


@dataclass(slots=True, eq=False)
class _Entry:
    digest: bytes
    task: asyncio.Task[tuple[bytes, bool]]
    waiters: int = 0


class Replies:
    """Encoded replies, running and done, by request. Done replies are bounded in bytes: the least recently used one of
    the tenant that holds most leaves.

    A computation is cancelled when its last waiter leaves.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._running: dict[Name, _Entry] = {}
        self._done: dict[str, OrderedDict[Name, tuple[bytes, bytes]]] = {}
        self._bytes: Counter[str] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of all kept replies."""
        return self._bytes.total()

    async def once(
        self,
        name: Name,
        digest: bytes,
        compute: Callable[[], Awaitable[tuple[bytes, bool]]],
        on_repeat: Callable[[], None] = lambda: None,
    ) -> bytes:
        """Return the reply to `name`. `compute` returns (reply, True if the reply may be kept).

        `digest` identifies the request's body. `on_repeat` is called if the reply of an earlier request is used. A
        request without an id is always computed. Raises Conflict if `name` came with another body.
        """
        if not name[2]:
            return (await compute())[0]
        kept = self._done.get(name[0], OrderedDict())
        if (done := kept.get(name)) is not None:
            self._require_same(done[0], digest)
            kept.move_to_end(name)
            on_repeat()
            return done[1]
        entry = self._running.get(name)
        if entry is None:
            entry = _Entry(digest, asyncio.ensure_future(self._compute(name, digest, compute)))
            self._running[name] = entry
        else:
            self._require_same(entry.digest, digest)
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
            # A failure is not kept: the next request tries again. After a cancellation the name may already belong to
            # another computation.
            entry = self._running.get(name)
            if entry is not None and entry.task is asyncio.current_task():
                del self._running[name]
        if keep and len(reply) + ENTRY_BYTES <= self._max_bytes:
            tenant = name[0]
            self._done.setdefault(tenant, OrderedDict())[name] = (digest, reply)
            self._bytes[tenant] += len(reply) + ENTRY_BYTES
            while self.nbytes > self._max_bytes:
                self._evict()
        return reply, keep

    def _evict(self) -> None:
        ((tenant, _),) = self._bytes.most_common(1)
        _, (_, oldest) = self._done[tenant].popitem(last=False)
        self._bytes[tenant] -= len(oldest) + ENTRY_BYTES

    @staticmethod
    def _require_same(known: bytes, digest: bytes) -> None:
        if known != digest:
            raise Conflict("this request id was used with another body: use a new id for each request")
