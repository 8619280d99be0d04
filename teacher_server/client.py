"""The client of a teacher server, and the scorer that rollout workers are given."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from common.codec import CodecError, decode_response, encode_context, encode_request
from common.schema import (
    PROTOCOL_VERSION,
    Context,
    ItemError,
    ItemScore,
    ScoredTrajectory,
    ScoreItem,
    ScoreMode,
    ScoreRequest,
    ScoreResponse,
    TeacherInfo,
    Trajectory,
)
from common.scoring import ScoringError, TeacherError
from teacher_server.transport import Transport

COALESCE_S = 0.005
"""How long a scorer waits for more finished answers before it sends a request."""
LOST_AFTER_S = 120.0
"""How long a teacher may be out of reach (restarting, loading its model) before the run stops."""

REPUT_ATTEMPTS = 3
"""How often contexts are put again for one call: a server that evicts them faster is too small for its clients."""

REQUEST_BYTES = 8 * 1024 * 1024
"""Largest request of a scorer (about 10,000 tokens at k = 256): small enough that several are in flight."""


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
        """`timeout_s` is the deadline of each call, retries included; see `Transport` for the others."""
        self.run = run
        self._transport = Transport(
            url, timeout_s=timeout_s, lost_after_s=lost_after_s, api_key=api_key, ca_file=ca_file
        )
        self.url = self._transport.url
        self._contexts: dict[str, Context] = {}

    async def info(self) -> TeacherInfo:
        """The handshake."""
        reply = await self._send("GET", "/v1/info")
        try:
            return TeacherInfo.model_validate_json(reply.content)
        except ValueError as error:
            raise TeacherError(
                f"{self.url} does not answer as a teacher of protocol {PROTOCOL_VERSION}: {_first_line(error)}"
            ) from error

    async def put_context(self, context: Context) -> None:
        """Hand a context over (its parent first, where it is one that this client was given before)."""
        self._contexts[context.hash] = context
        parent = self._contexts.get(context.parent) if context.parent else None
        if parent is not None:
            reply = await self._put(context, parent)
            if reply.status_code == 404:
                await self.put_context(parent)
                reply = await self._put(context, parent)
        else:
            reply = await self._put(replace(context, parent=None), None)
        _raise_for(reply, self.url)

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
        request = ScoreRequest(uuid.uuid4().hex, self.run, mode, temperature, k, tuple(items))
        reply = await self._send("POST", "/v1/score", encode_request(request))
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

    async def _put(self, context: Context, parent: Context | None) -> httpx.Response:
        body = encode_context(context, parent_tokens=0 if parent is None else int(parent.ids.size))
        return await self._transport.send("PUT", f"/v1/contexts/{context.hash}", body)

    async def _send(self, method: str, path: str, body: bytes | None = None) -> httpx.Response:
        reply = await self._transport.send(method, path, body)
        _raise_for(reply, self.url)
        return reply


def handshake(
    info: TeacherInfo, *, tokenizer_fingerprint: str, k: int, mode: ScoreMode, temperature: float, longest_tokens: int
) -> None:
    """Refuse a teacher that does not fit the run: TeacherError with the numbers and the remedy."""
    if info.protocol != PROTOCOL_VERSION:
        raise TeacherError(
            f"the teacher speaks protocol {info.protocol}, this run {PROTOCOL_VERSION}: use the same opcd on both sides"
        )
    if info.tokenizer_fingerprint != tokenizer_fingerprint:
        raise TeacherError(
            f"the teacher {info.model} has another tokenizer ({info.tokenizer_fingerprint[:12]}) than the student "
            f"({tokenizer_fingerprint[:12]}): token ids would mean different things; use models of one family"
        )
    if mode not in info.modes:
        raise TeacherError(
            f"the teacher's {info.backend} backend cannot score in mode {mode} (it can {', '.join(info.modes)}): "
            "use its transformers backend, or another loss.support"
        )
    temperatures = info.modes[mode]
    if temperatures is not None and temperature not in temperatures:
        raise TeacherError(
            f"the teacher scores mode {mode} at temperatures {list(temperatures)} only, "
            f"loss.temperature is {temperature}"
        )
    if k > info.max_k:
        raise TeacherError(
            f"loss.top_k is {k}, the teacher takes at most {info.max_k}: lower it, or raise the server's teacher.max_k"
        )
    if longest_tokens > info.max_sequence_tokens:
        raise TeacherError(
            f"the longest sequence (context + prompt + answer) has {longest_tokens} tokens, the teacher takes at most "
            f"{info.max_sequence_tokens}: shorten the context, lower rollout.max_tokens or raise "
            "teacher.max_sequence_tokens"
        )


def read_key(path: Path) -> str:
    """The key in a file (``teacher.key_file``); raises TeacherError, which never shows what is in it."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TeacherError(f"teacher.key_file {path} cannot be read: {type(error).__name__}") from error
    if not key or not key.isascii() or len(key.split()) != 1:
        raise TeacherError(f"teacher.key_file {path} must hold one key and nothing else")
    return key


@dataclass(frozen=True)
class TeacherScorerFactory:
    """Travels to a rollout worker; called there, makes its scorer."""

    url: str
    run: str
    expected_info: TeacherInfo
    contexts: tuple[Context, ...]
    mode: ScoreMode
    temperature: float
    k: int
    timeout_s: float
    api_key: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    lost_after_s: float = LOST_AFTER_S

    def __call__(self) -> TeacherScorer:
        """A scorer of this process."""
        return TeacherScorer(self)


@dataclass(slots=True, eq=False)
class _Waiting:
    item: ScoreItem
    future: asyncio.Future[tuple[ItemScore | ItemError, ScoreResponse]]

    @property
    def size(self) -> int:
        """Bytes on the wire, at most."""
        support = 0 if self.item.topk_ids is None else self.item.topk_ids.size
        return 256 + 3 * int(self.item.prompt_ids.size + self.item.response_ids.size + support)


class TeacherScorer:
    """Scores single answers; those that end at about the same time travel in one request."""

    def __init__(self, factory: TeacherScorerFactory) -> None:
        self._factory = factory
        self._client = TeacherClient(
            factory.url,
            factory.run,
            factory.timeout_s,
            factory.api_key,
            lost_after_s=factory.lost_after_s,
            ca_file=factory.ca_file,
        )
        self._waiting: list[_Waiting] = []
        self._flush: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._contexts_put: asyncio.Task[None] | None = None

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        """The teacher's log-probabilities for all response tokens; ScoringError, TeacherError."""
        await self._put_contexts()
        wants_ids = self._factory.mode in ("at_ids", "union")
        item = ScoreItem(
            context=trajectory.prompt.context,
            prompt_ids=trajectory.prompt.teacher_ids,
            response_ids=trajectory.response_ids,
            topk_ids=trajectory.topk_ids if wants_ids else None,
        )
        waiting = _Waiting(item, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._flush is None or self._flush.done():
            self._flush = asyncio.create_task(self._send_soon())
        result, response = await waiting.future
        self._check_identity(response)
        if isinstance(result, ItemError):
            raise ScoringError(f"sample {trajectory.sample_id}: {result.code}: {result.message}")
        if result.sampled_logprob.shape != trajectory.response_ids.shape:
            raise ScoringError(
                f"sample {trajectory.sample_id}: {trajectory.response_ids.size} response tokens were sent, "
                f"{result.sampled_logprob.size} came back scored"
            )
        return ScoredTrajectory(trajectory, result, response.model_fingerprint, response.weight_version)

    async def close(self) -> None:
        """Give up what is in flight and let go of the connections."""
        tasks = [task for task in (self._flush, self._contexts_put, *self._requests) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.close()

    async def _put_contexts(self) -> None:
        if self._contexts_put is None:
            self._contexts_put = asyncio.create_task(self._put_all())
        await asyncio.shield(self._contexts_put)

    async def _put_all(self) -> None:
        for context in self._factory.contexts:
            await self._client.put_context(context)

    async def _send_soon(self) -> None:
        await asyncio.sleep(COALESCE_S)
        waiting, self._waiting = self._waiting, []
        for group in self._groups(waiting):
            task = asyncio.create_task(self._send(group))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    def _groups(self, waiting: list[_Waiting]) -> list[list[_Waiting]]:
        """Requests within the teacher's limits; a single answer is never split."""
        info = self._factory.expected_info
        most = min(REQUEST_BYTES, info.max_body_bytes)
        groups: list[list[_Waiting]] = []
        size = 0
        for entry in waiting:
            if not groups or len(groups[-1]) >= info.max_items or size + entry.size > most:
                groups.append([])
                size = 0
            groups[-1].append(entry)
            size += entry.size
        return groups

    async def _send(self, group: list[_Waiting]) -> None:
        factory = self._factory
        try:
            response = await self._client.score(
                [entry.item for entry in group], factory.mode, factory.temperature, factory.k
            )
        except BaseException as error:  # the callers wait on futures: whatever happened must reach them
            for entry in group:
                if not entry.future.done():
                    entry.future.set_exception(
                        error if isinstance(error, Exception) else TeacherError("the scorer was closed")
                    )
            if not isinstance(error, Exception):
                raise
            return
        for entry, result in zip(group, response.results, strict=True):
            if not entry.future.done():
                entry.future.set_result((result, response))

    def _check_identity(self, response: ScoreResponse) -> None:
        expected = self._factory.expected_info
        if response.model_fingerprint != expected.model_fingerprint:
            raise TeacherError(
                f"the teacher at {self._factory.url} is another model now (fingerprint "
                f"{response.model_fingerprint[:12]}, the run began with {expected.model_fingerprint[:12]}): "
                f"start {expected.model} there again, or begin a new run"
            )
        if expected.kind == "frozen" and response.weight_version != expected.weight_version:
            raise TeacherError(
                f"the teacher at {self._factory.url} scores with weight version {response.weight_version}, the run "
                f"began with {expected.weight_version} and a frozen teacher: begin a new run"
            )


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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
