"""Bounds on request bodies: bytes of one body, bytes of all bodies together, and time to arrive."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request
from starlette.requests import ClientDisconnect

from teacher_server.http.http_limits import MIN_BYTES_PER_S
from teacher_server.scoring.checks import RequestRefused

IDLE_S = 15.0
"""Longest pause inside a body. A body of n bytes may take `IDLE_S` + n / `MIN_BYTES_PER_S`."""

WAIT_S = 10.0
"""Longest wait for room. The server does not read the body meanwhile, so the wait holds no memory."""


COPIES = 4
"""Copies of a body while it is decoded: as received, as the arrays' raw bytes, and as ids of twice their size."""

ITEM_WIRE_BYTES = 40
"""Fewest bytes of an item in a body."""

ITEM_BYTES = 4096
"""Memory of an item from decoding to its result: arrays, queue entry, score."""


@dataclass(slots=True, eq=False)
class _Waiter:
    tenant: str
    size: int
    admitted: asyncio.Event = field(default_factory=asyncio.Event)


class ByteBudget:
    """A semaphore of bytes, first come first served. One tenant holds at most half; a larger size counts as half."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()
        self._waiters: list[_Waiter] = []

    @property
    def held(self) -> int:
        """Bytes held by all tenants."""
        return self._held.total()

    @asynccontextmanager
    async def hold(self, tenant: str, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes until the scope ends. Raises RequestRefused (429) after `WAIT_S` without room."""
        size = min(size, self._max_bytes // 2)
        waiter = _Waiter(tenant, size)
        self._waiters.append(waiter)
        try:
            self._admit()
            try:
                async with asyncio.timeout(WAIT_S):
                    await waiter.admitted.wait()
            except TimeoutError as error:
                raise RequestRefused(
                    429, "memory", "the requests in progress hold too many bytes", retry_after_s=1.0
                ) from error
            yield
        finally:
            if waiter.admitted.is_set():
                self._held[tenant] -= size
                self._held += Counter()  # drops tenants that hold nothing
            else:
                self._waiters.remove(waiter)
            self._admit()

    def _admit(self) -> None:
        """Admit waiters in order; stop at the first one that does not fit. Skip waiters above their tenant's half."""
        for waiter in list(self._waiters):
            if self._held[waiter.tenant] + waiter.size > self._max_bytes / 2:
                continue
            if self.held + waiter.size > self._max_bytes:
                return
            self._held[waiter.tenant] += waiter.size
            self._waiters.remove(waiter)
            waiter.admitted.set()


def memory_of(size: int, max_items: int) -> int:
    """Bytes that a body of `size` bytes holds at most: tiny items take far more memory than on the wire."""
    return COPIES * size + ITEM_BYTES * min(max_items, size // ITEM_WIRE_BYTES)


@asynccontextmanager
async def read_body(
    request: Request, budget: ByteBudget, tenant: str, *, max_bytes: int, max_items: int = 0
) -> AsyncIterator[bytes]:
    """Read a body and hold its `memory_of` in `budget` until the scope ends.

    A body without Content-Length counts as `max_bytes`.

    Raises RequestRefused: 408 (too slow), 413 (too large), 429 (no room), 499 (the client left).
    """
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdigit() else max_bytes
    if size > max_bytes:
        raise RequestRefused(413, "body", f"the body has {size} bytes, at most {max_bytes}")
    async with budget.hold(tenant, memory_of(size, max_items)):
        yield await _collect(request, size)


async def _collect(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    stream = aiter(request.stream())
    clock = asyncio.get_running_loop().time
    deadline = clock() + IDLE_S + max_bytes / MIN_BYTES_PER_S
    while True:
        try:
            async with asyncio.timeout(min(IDLE_S, deadline - clock())):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except TimeoutError as error:
            raise RequestRefused(408, "body", "the body came too slowly") from error
        except ClientDisconnect as error:
            raise RequestRefused(499, "gone", "the client closed the connection") from error
        size += len(chunk)
        if size > max_bytes:
            raise RequestRefused(413, "body", f"the body has more than {max_bytes} bytes")
        if chunk:
            chunks.append(chunk)
