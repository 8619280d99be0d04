"""Reading request bodies: bounded one by one and all together, before memory is taken, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request
from starlette.requests import ClientDisconnect

from teacher_server.scoring.checks import RequestRefused

IDLE_S = 15.0
"""Longest silence inside a body."""

SLOWEST_BYTES_PER_S = 256 * 1024
"""A body of n bytes may take `IDLE_S` and n over this."""


WAIT_S = 10.0
"""How long a body may wait for room before its request is sent away; it is not read meanwhile, so it costs nothing."""


@dataclass(eq=False)
class _Waiting:
    tenant: str
    size: int
    admitted: asyncio.Event = field(default_factory=asyncio.Event)


class BodyBudget:
    """Bytes of all bodies that are being read, worked on or made. One tenant holds at most half of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self._by_tenant: dict[str, int] = {}
        self._waiting: list[_Waiting] = []

    @asynccontextmanager
    async def read(self, request: Request, tenant: str, limit: int) -> AsyncIterator[bytes]:
        """The body of `request`, whose memory counts until the scope ends. Raises RequestRefused: 413, 429, 408, 499.

        A body whose length is declared waits for room, up to `WAIT_S`; of the others each piece must find some.
        """
        declared = _declared(request)
        if declared is None:
            async with self._piecewise(tenant) as take:
                yield await self._collect(request, limit, take)
            return
        if declared > limit:
            raise RequestRefused(413, "body", f"the body has {declared} bytes, at most {limit}")
        async with self.room(tenant, declared):
            yield await self._collect(request, declared, None)

    @asynccontextmanager
    async def room(self, tenant: str, size: int) -> AsyncIterator[None]:
        """A scope that holds `size` bytes, in the order of arrival. Raises RequestRefused (429) after `WAIT_S`."""
        waiting = _Waiting(tenant, size)
        self._waiting.append(waiting)
        try:
            self._admit()
            try:
                async with asyncio.timeout(WAIT_S):
                    await waiting.admitted.wait()
            except TimeoutError as error:
                raise _full() from error
            yield
        finally:
            if waiting.admitted.is_set():
                self._give_back(tenant, size)
            else:
                self._waiting.remove(waiting)
                self._admit()

    @asynccontextmanager
    async def _piecewise(self, tenant: str) -> AsyncIterator[Callable[[int], None]]:
        """A function that takes bytes or raises RequestRefused; waiting would lock half-read bodies against others."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if not self._fits(tenant, size):
                raise _full()
            self._hold(tenant, size)
            taken += size

        try:
            yield take
        finally:
            self._give_back(tenant, taken)

    async def _collect(self, request: Request, limit: int, take: Callable[[int], None] | None) -> bytes:
        chunks: list[bytes] = []
        size = 0
        stream = request.stream().__aiter__()
        deadline = asyncio.get_running_loop().time() + IDLE_S + limit / SLOWEST_BYTES_PER_S
        while True:
            try:
                async with asyncio.timeout(min(IDLE_S, deadline - asyncio.get_running_loop().time())):
                    chunk = await anext(stream)
            except StopAsyncIteration:
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)
            except TimeoutError as error:
                raise RequestRefused(408, "body", "the body came too slowly") from error
            except ClientDisconnect as error:
                raise RequestRefused(499, "gone", "the client closed the connection") from error
            size += len(chunk)
            if size > limit:
                raise RequestRefused(413, "body", f"the body has more than {limit} bytes")
            if take is not None:
                take(len(chunk))
            if chunk:
                chunks.append(chunk)

    def _admit(self) -> None:
        """Let in who fits, first come first served; who waits for its own tenant's bodies keeps nobody else waiting."""
        for waiting in list(self._waiting):
            if self._fits(waiting.tenant, waiting.size):
                self._hold(waiting.tenant, waiting.size)
                self._waiting.remove(waiting)
                waiting.admitted.set()
            elif self._within_share(waiting.tenant, waiting.size):
                return

    def _fits(self, tenant: str, size: int) -> bool:
        # The first body is always taken: a limit smaller than one body would refuse it for ever.
        room = not self.held or self.held + size <= self.max_bytes
        return room and self._within_share(tenant, size)

    def _within_share(self, tenant: str, size: int) -> bool:
        mine = self._by_tenant.get(tenant, 0)
        return not mine or mine + size <= self.max_bytes / 2

    def _hold(self, tenant: str, size: int) -> None:
        self.held += size
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + size

    def _give_back(self, tenant: str, size: int) -> None:
        self.held -= size
        left = self._by_tenant.get(tenant, 0) - size
        if left > 0:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)
        self._admit()


def _full() -> RequestRefused:
    return RequestRefused(429, "memory", "too many bytes of requests are being worked on", retry_after_s=1.0)


def _declared(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdigit() else None
