"""The scorer of rollout workers: it batches single trajectories into requests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from common.protocol.schema import (
    Context,
    ItemError,
    ItemScore,
    ScoredTrajectory,
    ScoreItem,
    ScoreMode,
    ScoreResponse,
    TeacherInfo,
    Trajectory,
)
from common.protocol.scoring import ScoringError, TeacherError
from teacher_server.client.client import LOST_AFTER_S, TeacherClient
from teacher_server.client.held_contexts import HeldContexts
from teacher_server.client.request_batching import RequestLimits, split_requests
from teacher_server.client.validation import score_error

COALESCE_S = 0.005
"""Seconds that a scorer waits for more trajectories before it sends a request."""


@dataclass(frozen=True)
class TeacherScorerFactory:
    """Serialisable factory; a rollout worker calls it to make its scorer."""

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
        """Make the scorer of this process."""
        return TeacherScorer(self)


@dataclass(slots=True, eq=False)
class _PendingItem:
    item: ScoreItem
    future: asyncio.Future[tuple[ItemScore | ItemError, ScoreResponse]]


class TeacherScorer:
    """Scores single trajectories; those that finish within `COALESCE_S` share a request.

    The run's contexts are put before the first score, a row's own context with its first score.
    """

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
        self._held = HeldContexts(self._client)
        self._pending: list[_PendingItem] = []
        self._flush: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._contexts_put: asyncio.Task[None] | None = None

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        """Log-probs of the teacher for all response tokens.

        Raises ScoringError for this sample, TeacherError if the teacher is lost or changed.
        """
        await self._put_contexts()
        own = trajectory.prompt.own_context
        if own is None:
            return await self._score(trajectory)
        async with self._held.hold(own):
            return await self._score(trajectory)

    async def _score(self, trajectory: Trajectory) -> ScoredTrajectory:
        wants_ids = self._factory.mode in ("at_ids", "union")
        item = ScoreItem(
            context=trajectory.prompt.context,
            prompt_ids=trajectory.prompt.teacher_ids,
            response_ids=trajectory.response_ids,
            topk_ids=trajectory.topk_ids if wants_ids else None,
        )
        pending = _PendingItem(item, asyncio.get_running_loop().create_future())
        self._pending.append(pending)
        if self._flush is None or self._flush.done():
            self._flush = asyncio.create_task(self._send_soon())
        result, response = await pending.future
        self._check_identity(response)
        if isinstance(result, ItemError):
            raise ScoringError(f"sample {trajectory.sample_id}: {result.code}: {result.message}")
        error = score_error(result, item, self._factory.mode, self._factory.k)
        if error is not None:
            raise ScoringError(f"sample {trajectory.sample_id}: {error}")
        return ScoredTrajectory(trajectory, result, response.model_fingerprint, response.weight_version)

    async def close(self) -> None:
        """Cancel all requests and close the connections."""
        tasks = [task for task in (self._flush, self._contexts_put, *self._requests) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._held.close()
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
        pending, self._pending = self._pending, []
        factory, limits = self._factory, RequestLimits.of(self._factory.expected_info)
        for group in split_requests(pending, lambda entry: entry.item, factory.mode, factory.k, limits):
            task = asyncio.create_task(self._send(group))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _send(self, group: list[_PendingItem]) -> None:
        factory = self._factory
        try:
            response = await self._client.score(
                [entry.item for entry in group], factory.mode, factory.temperature, factory.k
            )
        except BaseException as error:  # the callers wait on futures, so every error must reach them
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
                f"start {expected.model} at this address again, or begin a new run"
            )
        if expected.kind == "frozen" and response.weight_version != expected.weight_version:
            raise TeacherError(
                f"the teacher at {self._factory.url} scores with weight version {response.weight_version}, the run "
                f"began with {expected.weight_version} and a frozen teacher: begin a new run"
            )
