"""The client of a teacher server: contexts are put, items are scored, and what the server has lost is put again."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import httpx

from common.protocol.codec import CodecError, decode_response, encode_context, encode_request
from common.protocol.schema import (
    PROTOCOL_VERSION,
    Context,
    ItemError,
    ItemScore,
    ScoreItem,
    ScoreMode,
    ScoreRequest,
    ScoreResponse,
    TeacherInfo,
)
from common.protocol.scoring import TeacherError
from teacher_server.client.request_batching import Bounds, requests
from teacher_server.client.transport import Transport

T = TypeVar("T")

LOST_AFTER_S = 120.0
"""How long a teacher may be out of reach (restarting, loading its model) before the run stops."""

REPUT_ATTEMPTS = 3
"""How often contexts are put again for one call: a server that evicts them faster is too small for its clients."""

IN_FLIGHT = 4
"""Requests of one call that travel at the same time."""


class TeacherClient:
    """Talks to one teacher server. All methods raise TeacherError when the teacher is lost or refuses the run."""

    def __init__(
        self,
        url: str,
        run: str,
        timeout_s: float,
        api_key: str | None = None,
        *,
        lost_after_s: float = LOST_AFTER_S,
        ca_file: str | None = None,
    ) -> None:
        """`timeout_s` is the deadline of each call, retries included; see `Transport` for the others.

        Raises TeacherError where `url` is none.
        """
        _check_url(url)
        self.run = run
        self._transport = Transport(
            url, timeout_s=timeout_s, lost_after_s=lost_after_s, api_key=api_key, ca_file=ca_file
        )
        self.url = self._transport.url
        self._contexts: dict[str, Context] = {}
        self.bounds = Bounds()
        """Of one request to this server, as far as it is known."""

    async def info(self) -> TeacherInfo:
        """The handshake; from here on requests keep to this server's limits."""
        reply = await self._transport.send("GET", "/v1/info")
        _raise_for(reply, self.url)
        try:
            info = TeacherInfo.model_validate_json(reply.content)
        except ValueError as error:
            raise TeacherError(
                f"{self.url} does not answer as a teacher of protocol {PROTOCOL_VERSION}: {_first_line(error)}"
            ) from error
        self.bounds = Bounds.of(info)
        return info

    async def put_context(self, context: Context) -> None:
        """Hand a context over (its parent first, where it is one that this client was given before)."""
        self._contexts[context.hash] = context
        await self._put(context, route=context.hash)

    async def score(self, items: Sequence[ScoreItem], mode: ScoreMode, temperature: float, k: int) -> ScoreResponse:
        """Score `items`; contexts that this client was given and the server has lost are put again."""
        response = await self._score(mode, temperature, k, items)
        for _ in range(REPUT_ATTEMPTS):
            lost = self._lost(items, response)
            if not lost:
                break
            for name in {items[i].context for i in lost}:
                assert name is not None
                await self.put_context(self._contexts[name])
            again = await self._score(mode, temperature, k, [items[i] for i in lost])
            if _identity(again) != _identity(response):
                # The server was replaced in between: one response must have one identity.
                response = await self._score(mode, temperature, k, items)
                continue
            results = list(response.results)
            for i, result in zip(lost, again.results, strict=True):
                results[i] = result
            response = replace(response, results=tuple(results))
        return response

    async def close(self) -> None:
        """Let go of the connections."""
        await self._transport.close()

    async def _score(self, mode: ScoreMode, temperature: float, k: int, items: Sequence[ScoreItem]) -> ScoreResponse:
        """All items by one teacher: in several requests where they are large or of several contexts."""
        # A request of no items still says who answers.
        parts = list(requests(range(len(items)), items.__getitem__, mode, k, self.bounds)) or [[]]
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def part(numbers: list[int]) -> ScoreResponse:
            async with slots:
                return await self._exchange(mode, temperature, k, [items[i] for i in numbers])

        for _ in range(REPUT_ATTEMPTS):
            responses = await _together([part(numbers) for numbers in parts])
            if len({_identity(response) for response in responses}) == 1:
                break
        else:
            raise TeacherError(f"the teacher at {self.url} is replaced by another one again and again")
        results: list[ItemScore | ItemError | None] = [None] * len(items)
        for numbers, response in zip(parts, responses, strict=True):
            for i, result in zip(numbers, response.results, strict=True):
                results[i] = result
        return replace(responses[0], results=tuple(result for result in results if result is not None))

    async def _exchange(self, mode: ScoreMode, temperature: float, k: int, items: list[ScoreItem]) -> ScoreResponse:
        """One request, whose items have one context."""
        request = ScoreRequest(uuid.uuid4().hex, self.run, mode, temperature, k, tuple(items))
        reply = await self._transport.send(
            "POST", "/v1/score", encode_request(request), route=items[0].context if items else None
        )
        _raise_for(reply, self.url)
        try:
            response = decode_response(reply.content)
        except CodecError as error:
            raise TeacherError(f"{self.url} answered what is not a score: {error}") from error
        if response.request_id != request.request_id or len(response.results) != len(items):
            raise TeacherError(f"{self.url} answered another request than the one that was sent")
        return response

    def _lost(self, items: Sequence[ScoreItem], response: ScoreResponse) -> list[int]:
        """Numbers of the items whose context the server does not have and this client does."""
        return [
            i
            for i, (item, result) in enumerate(zip(items, response.results, strict=True))
            if isinstance(result, ItemError) and result.code == "unknown_context" and item.context in self._contexts
        ]

    async def _put(self, context: Context, *, route: str) -> None:
        """Ancestors go where their descendant goes: a server of several replicas keeps a context on one of them."""
        path = f"/v1/contexts/{context.hash}"
        parent = self._contexts.get(context.parent) if context.parent else None
        if parent is None:
            body = encode_context(replace(context, parent=None))
        else:
            body = encode_context(context, parent_tokens=int(parent.ids.size))
        reply = await self._transport.send("PUT", path, body, route=route)
        if parent is not None and reply.status_code == 404:
            await self._put(parent, route=route)
            reply = await self._transport.send("PUT", path, body, route=route)
        _raise_for(reply, self.url)


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _identity(response: ScoreResponse) -> tuple[str, int]:
    return response.model_fingerprint, response.weight_version


def _raise_for(reply: httpx.Response, url: str) -> None:
    if reply.status_code < 400:
        return
    try:
        detail = reply.json()
        text = f"{detail['error']}: {detail['message']}"
    except (ValueError, KeyError, TypeError):
        text = reply.text[:200]
    raise TeacherError(f"the teacher at {url} refused with HTTP {reply.status_code}: {text}")


def _check_url(url: str) -> None:
    """Else a slip of the pen would look like a server that is down, and be waited for."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TeacherError(f"teacher.url {url!r} is no address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TeacherError(f"teacher.url {url!r} is no address: write it as http://HOST:PORT or https://HOST:PORT")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
