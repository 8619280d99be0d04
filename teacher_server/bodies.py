"""Reading request bodies: bounded one by one and all together, before memory is taken, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request

from teacher_server.checks import RequestRefused

IDLE_S = 15.0
"""Longest silence inside a body."""

SLOWEST_BYTES_PER_S = 256 * 1024
"""A body of n bytes may take `IDLE_S` and n over this."""


@dataclass
class BodyBudget:
    """Bytes of all bodies that are being read or worked on. One tenant holds at most half of it."""

    max_bytes: int

    def __post_init__(self) -> None:
        self.held = 0
        self._by_tenant: dict[str, int] = {}

    @asynccontextmanager
    async def read(self, request: Request, tenant: str, limit: int) -> AsyncIterator[bytes]:
        """The body of `request`, whose memory counts until the scope ends. Raises RequestRefused: 413, 429, 408."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            self._take(tenant, size)
            taken += size

        try:
            declared = _declared(request)
            if declared is not None:
                if declared > limit:
                    raise RequestRefused(413, "body", f"the body has {declared} bytes, at most {limit}")
                take(declared)
            yield await self._collect(
                request, limit if declared is None else declared, take if declared is None else None
            )
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
            size += len(chunk)
            if size > limit:
                raise RequestRefused(413, "body", f"the body has more than {limit} bytes")
            if take is not None:
                take(len(chunk))
            if chunk:
                chunks.append(chunk)

    def _take(self, tenant: str, size: int) -> None:
        mine = self._by_tenant.get(tenant, 0)
        # The first body is always taken: a limit smaller than one body would refuse it for ever.
        if self.held and (self.held + size > self.max_bytes or (mine and mine + size > self.max_bytes / 2)):
            raise RequestRefused(429, "memory", "too many bytes of requests are being worked on", retry_after_s=1.0)
        self.held += size
        self._by_tenant[tenant] = mine + size

    def _give_back(self, tenant: str, size: int) -> None:
        self.held -= size
        left = self._by_tenant.get(tenant, 0) - size
        if left > 0:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)


def _declared(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdigit() else None
