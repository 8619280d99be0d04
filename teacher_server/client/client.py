"""Client of a teacher server: puts contexts, scores items, and puts contexts again that the server evicted."""

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
from teacher_server.client.request_batching import RequestLimits, split_requests
from teacher_server.client.transport import Transport

T = TypeVar("T")

LOST_AFTER_S = 120.0
"""Seconds that a teacher may be unreachable (restarting, loading its model) before the run stops."""

REPUT_ATTEMPTS = 3
"""Retries of one call after evicted contexts; a server that evicts faster is too small for its clients."""

MAX_CONCURRENT_REQUESTS = 4
"""Concurrent requests of one call."""


class ContextTooLong(TeacherError):
    """The server takes no context of that length."""


class TeacherClient:
    """Client of one teacher server. Methods raise TeacherError if the teacher is lost or refuses a request."""

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
        """`timeout_s` is the deadline of each call, retries included; `Transport` documents the other arguments.

        Raises TeacherError if `url` is not an HTTP address.
        """
        _check_url(url)
        self.run = run
        self._transport = Transport(
            url, timeout_s=timeout_s, lost_after_s=lost_after_s, api_key=api_key, ca_file=ca_file
        )
        self.url = self._transport.url
        self._has_key = api_key is not None
        self._contexts: dict[str, Context] = {}
        self._limits = RequestLimits()

    async def info(self) -> TeacherInfo:
        """Information about the teacher. Later requests keep to the limits that it states."""
        reply = await self._transport.send("GET", "/v1/info")
        _raise_for(reply, self.url, has_key=self._has_key)
        try:
            info = TeacherInfo.model_validate_json(reply.content)
        except ValueError as error:
            raise TeacherError(
                f"{self.url} does not answer as a teacher of protocol {PROTOCOL_VERSION}: {str(error).splitlines()[0]}"
            ) from error
        self._limits = RequestLimits.of(info)
        return info

    async def put_context(self, context: Context) -> None:
        """Put a context, and before it a parent that this client put earlier and the server lacks."""
        self.keep_context(context)
        await self._put(context, route=context.hash)

    def keep_context(self, context: Context) -> None:
        """Keep a context, to put it again if the server evicts it."""
        self._contexts[context.hash] = context

    def forget_context(self, name: str) -> None:
        """Drop a context that no score needs any more."""
        self._contexts.pop(name, None)

    async def score(self, items: Sequence[ScoreItem], mode: ScoreMode, temperature: float, k: int) -> ScoreResponse:
        """Score `items`. Contexts of this client that the server evicted are put again."""
        response = await self._score(mode, temperature, k, items)
        for _ in range(REPUT_ATTEMPTS):
            missing = self._without_context(items, response)
            if not missing:
                break
            for name in {items[i].context for i in missing}:
                assert name is not None
                await self.put_context(self._contexts[name])
            again = await self._score(mode, temperature, k, [items[i] for i in missing])
            if _identity(again) != _identity(response):
                # The server was replaced meanwhile, and a response must have one identity.
                response = await self._score(mode, temperature, k, items)
                continue
            results = list(response.results)
            for i, result in zip(missing, again.results, strict=True):
                results[i] = result
            response = replace(response, results=tuple(results))
        return response

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def _score(self, mode: ScoreMode, temperature: float, k: int, items: Sequence[ScoreItem]) -> ScoreResponse:
        """Score all items with one model version, in several requests if they are large or have several contexts."""
        # A request without items still returns the model's identity.
        parts = list(split_requests(range(len(items)), items.__getitem__, mode, k, self._limits)) or [[]]
        slots = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)

        async def exchange(indices: list[int]) -> ScoreResponse:
            async with slots:
                return await self._exchange(mode, temperature, k, [items[i] for i in indices])

        for _ in range(REPUT_ATTEMPTS):
            responses = await _all_or_cancel([exchange(indices) for indices in parts])
            if len({_identity(response) for response in responses}) == 1:
                break
        else:
            raise TeacherError(
                f"the teacher at {self.url} changed its model or weight version in each of {REPUT_ATTEMPTS} attempts"
            )
        results: list[ItemScore | ItemError | None] = [None] * len(items)
        for indices, response in zip(parts, responses, strict=True):
            for i, result in zip(indices, response.results, strict=True):
                results[i] = result
        return replace(responses[0], results=tuple(result for result in results if result is not None))

    async def _exchange(self, mode: ScoreMode, temperature: float, k: int, items: list[ScoreItem]) -> ScoreResponse:
        """Send one request; its items have one context."""
        request = ScoreRequest(uuid.uuid4().hex, self.run, mode, temperature, k, tuple(items))
        reply = await self._transport.send(
            "POST", "/v1/score", encode_request(request), route=items[0].context if items else None
        )
        _raise_for(reply, self.url, has_key=self._has_key)
        try:
            response = decode_response(reply.content)
        except CodecError as error:
            raise TeacherError(f"the reply of {self.url} is not a score: {error}") from error
        if response.request_id != request.request_id or len(response.results) != len(items):
            raise TeacherError(f"the reply of {self.url} belongs to another request")
        return response

    def _without_context(self, items: Sequence[ScoreItem], response: ScoreResponse) -> list[int]:
        """Indices of the items whose context the server lacks and this client has."""
        return [
            i
            for i, (item, result) in enumerate(zip(items, response.results, strict=True))
            if isinstance(result, ItemError) and result.code == "unknown_context" and item.context in self._contexts
        ]

    async def _put(self, context: Context, *, route: str) -> None:
        """Put ancestors with the descendant's route: a server of several replicas keeps a context on one replica."""
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
        _raise_for(reply, self.url, has_key=self._has_key)


async def _all_or_cancel(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first failure cancels the other coroutines and is raised."""
    tasks = [asyncio.create_task(each) for each in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _identity(response: ScoreResponse) -> tuple[str, int]:
    return response.model_fingerprint, response.weight_version


def _raise_for(reply: httpx.Response, url: str, *, has_key: bool) -> None:
    if reply.status_code < 400:
        return
    if reply.status_code == 401:
        if has_key:
            raise TeacherError(
                f"the teacher at {url} does not know the key in teacher.client_key_file: it is wrong or expired"
            )
        raise TeacherError(f"the teacher at {url} wants a key: set teacher.client_key_file to the file that holds it")
    kind = TeacherError
    try:
        detail = reply.json()
        text = f"{detail['error']}: {detail['message']}"
        if detail["error"] == "too_long":
            kind = ContextTooLong
    except (ValueError, KeyError, TypeError):
        text = reply.text[:200]
    raise kind(f"the teacher at {url} refused with HTTP {reply.status_code}: {text}")


def _check_url(url: str) -> None:
    """Raise TeacherError for a mistyped URL, which would otherwise look like a server that is down."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TeacherError(f"teacher.url {url!r} is not an address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TeacherError(f"teacher.url {url!r} is not an address: write it as http://HOST:PORT or https://HOST:PORT")
