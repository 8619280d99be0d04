"""Contexts of single rows: put at the server when a score needs them, kept only as long."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.protocol.schema import Context
from common.protocol.scoring import ScoringError
from teacher_server.client.client import ContextTooLong, TeacherClient

REMEMBERED_PUTS = 4096
"""Names of contexts that the server probably still holds; a wrong guess costs one more request."""


class HeldContexts:
    """Puts each context once, and lets the client put it again, if the server evicts it, while a score needs it.

    Memory is bounded by the scores in flight, whatever the number of rows.
    """

    def __init__(self, client: TeacherClient) -> None:
        self._client = client
        self._users: Counter[str] = Counter()
        self._puts: dict[str, asyncio.Task[None]] = {}
        self._put: OrderedDict[str, None] = OrderedDict()

    @asynccontextmanager
    async def hold(self, context: Context) -> AsyncIterator[None]:
        """Put `context` if the server may lack it, and keep it until the scope ends.

        Raises ScoringError if it is too long for the server, TeacherError as the client.
        """
        name = context.hash
        self._users[name] += 1
        try:
            await self._put_once(context)
            yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self._client.forget_context(name)

    async def _put_once(self, context: Context) -> None:
        name = context.hash
        self._client.keep_context(context)
        if name in self._put:
            self._put.move_to_end(name)
            return
        if name not in self._puts:
            task = self._puts[name] = asyncio.create_task(self._client.put_context(context))
            task.add_done_callback(lambda done: self._finish_put(name))
        try:
            await asyncio.shield(self._puts[name])
        except ContextTooLong as error:
            raise ScoringError(str(error)) from error
        self._put[name] = None
        if len(self._put) > REMEMBERED_PUTS:
            self._put.popitem(last=False)

    def _finish_put(self, name: str) -> None:
        del self._puts[name]
        if name not in self._users:  # whoever waited for it was cancelled
            self._client.forget_context(name)

    async def close(self) -> None:
        """Cancel the puts under way."""
        tasks = list(self._puts.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
