"""The scoring service without HTTP: contexts, checks, the queue and the weights of one model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from common.config.model import TeacherConfig
from common.protocol.schema import (
    PROTOCOL_VERSION,
    Context,
    Ids,
    ItemError,
    ItemScore,
    ScoreRequest,
    ScoreResponse,
    TeacherInfo,
)
from common.weight_sync.collective import SyncError
from teacher_server.backends.base import Backend, LiveBackend, Work
from teacher_server.scoring.checks import RequestRefused, check_item, check_request
from teacher_server.scoring.contexts import ContextRef, ContextRefused, ContextStore
from teacher_server.scoring.metrics import Metrics
from teacher_server.scoring.scheduler import RUN_SHARE, BatchReport, QueueFull, Scheduler, SchedulerStopped
from teacher_server.scoring.tracing import Tracing
from teacher_server.scoring.turns import Turns

INLINE_ITEMS = 16
"""Requests of more items are checked in a thread, so that the event loop stays free."""

CONTEXT_IDS_BYTES = 256 * 1024 * 1024
"""Bound on the ids of all stored contexts. ``teacher.context_cache_bytes`` bounds their states."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Fingerprints of the model's tokenizer, and the tokens above its base vocabulary."""

    tokenizer: str
    chat_template: str
    added_tokens: Mapping[int, str] = field(default_factory=dict)


class TeacherService:
    """One model with its contexts and its queue. Call `start`, `stop` and `score` on one event loop."""

    def __init__(
        self,
        backend: Backend,
        config: TeacherConfig,
        identity: TokenizerIdentity,
        *,
        thread_setup: Callable[[], None] | None = None,
        on_stop: Callable[[], None] | None = None,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`thread_setup` runs in the worker thread, `on_stop` after the thread has ended.

        `on_failure` is called with the reason when the batch loop fails.
        """
        self._backend = backend
        self._config = config
        self._identity = identity
        self._max_sequence = min(config.max_sequence_tokens or backend.max_sequence_tokens, backend.max_sequence_tokens)
        self._thread_setup = thread_setup
        self._on_stop = on_stop
        self._on_failure = on_failure
        self._scheduler: Scheduler | None = None
        self._draining = False
        self._broken: str | None = None
        self.contexts = ContextStore(
            identity.tokenizer, max_tokens=self._max_sequence, max_bytes=CONTEXT_IDS_BYTES, embeds=backend.embeds
        )
        self.metrics = Metrics()
        self.tracing = Tracing(config.trace_endpoint)
        self.turns = Turns()

    def start(self) -> None:
        """Start taking requests."""
        self._scheduler = Scheduler(
            self._backend,
            batch_tokens=self._config.batch_tokens,
            batch_items=self._config.batch_items,
            window_s=self._config.batch_window_ms / 1000,
            max_queued_tokens=self._config.max_queued_tokens,
            context_cache_bytes=self._config.context_cache_bytes,
            context_host_bytes=self._config.context_host_bytes,
            thread_setup=self._thread_setup,
            on_batch=self._observe,
            on_failure=self._on_failure,
        )
        self._scheduler.start()

    async def stop(self) -> None:
        """Refuse new requests and finish the queued ones."""
        self.drain()
        if self._scheduler is not None:
            await self._scheduler.stop()
        if self._on_stop is not None:
            await asyncio.to_thread(self._on_stop)
        await asyncio.to_thread(self.tracing.close)

    def drain(self) -> None:
        """Refuse new requests from now on. Thread-safe."""
        self._draining = True

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self._scheduler is not None and self.failure is None and not self._draining and self._broken is None

    @property
    def failure(self) -> str | None:
        """The fault that ended the batch loop, which only a new process repairs; None without a fault."""
        return None if self._scheduler is None else self._scheduler.failure

    def load_weights(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Replace the weights between two batches; blocks, so call it outside the event loop's thread.

        Raises SyncError. The service then refuses every request: the weights are a mixture of two versions.
        """
        self._change(
            lambda backend: backend.load_weights(tensors, version), f"weights of version {version} did not arrive whole"
        )

    @property
    def device(self) -> Any:
        """The device that receives new weights."""
        return cast(LiveBackend, self._backend).device

    def save_state(self, path: Path) -> None:
        """Write the weights and their version to one file, for a resumed run."""
        self._between_batches(lambda backend: backend.save_state(path))

    def load_state(self, path: Path) -> None:
        """Read the file of `save_state`. The service refuses every request if that fails."""
        self._change(lambda backend: backend.load_state(path), f"the weights in {path} were not read whole")

    def _change(self, call: Callable[[LiveBackend], None], fault: str) -> None:
        def change(backend: LiveBackend) -> None:
            try:
                call(backend)
            except BaseException as error:
                # Set on the worker thread: the next batch may already be in the queue of this thread.
                self._broken = f"{fault}: {error}"
                raise

        self._between_batches(change)

    def _between_batches(self, call: Callable[[LiveBackend], None]) -> None:
        if self._scheduler is None:
            raise SyncError("the teacher takes weights only after its server has started")
        backend = cast(LiveBackend, self._backend)
        self._scheduler.between_batches(lambda: call(backend)).result()

    def info(self) -> TeacherInfo:
        """Handshake: the model's identity, modes and bounds."""
        backend, config = self._backend, self._config
        assert config.kind != "base"  # `build_service` refuses it
        return TeacherInfo(
            protocol=PROTOCOL_VERSION,
            model=backend.model_name,
            model_fingerprint=backend.model_fingerprint,
            tokenizer_fingerprint=self._identity.tokenizer,
            added_tokens=dict(self._identity.added_tokens),
            chat_template_fingerprint=self._identity.chat_template,
            backend=backend.name,
            path=backend.path,
            path_cost=backend.path_cost,
            dtype=backend.dtype,
            vocab_size=backend.vocab_size,
            max_k=min(config.max_k, backend.vocab_size),
            max_sequence_tokens=self._max_sequence,
            max_items=config.max_items,
            max_body_bytes=config.max_body_bytes,
            max_request_tokens=max(1, int(RUN_SHARE * config.max_queued_tokens)),
            modes=dict(backend.modes),
            kind=config.kind,
            weight_version=backend.weight_version,
        )

    def put_context(self, tenant: str, name: str, ids: Ids, parent: str | None) -> Context:
        """Store a context. Raises RequestRefused."""
        if self._draining:
            raise _shutting_down()
        try:
            return self.contexts.put(tenant, name, ids, parent)
        except ContextRefused as error:
            status = 404 if error.code == "unknown_parent" else 422
            raise RequestRefused(status, error.code, str(error)) from error

    def check(self, request: ScoreRequest) -> int:
        """Check a request against the bounds of the handshake. Thread-safe. Raises RequestRefused.

        Returns an upper bound for the bytes of its reply.
        """
        return check_request(request, self.info())

    async def score(self, tenant: str, request: ScoreRequest) -> ScoreResponse:
        """Score each valid item and return an ItemError for each other one.

        Items of a cancelled caller leave the queue. Raises RequestRefused for the whole request.
        """
        scheduler = self._scheduler
        self._refuse_if_broken()
        if scheduler is None or self._draining:
            raise _shutting_down()
        contexts = self._find_contexts(tenant, request, scheduler)
        if len(request.items) > INLINE_ITEMS:
            faults, works = await self.turns.run(tenant, self._prepare, request, contexts)
        else:
            faults, works = self._prepare(request, contexts)
        try:
            scored, version = await _score_with_one_version(scheduler, tenant, request.run, works)
        except QueueFull as error:
            raise RequestRefused(429, "busy", str(error), retry_after_s=error.retry_after_s) from error
        except SchedulerStopped as error:
            raise RequestRefused(503, "broken", str(error)) from error
        self._refuse_if_broken()  # an update may have failed while these items waited
        scores = iter(scored)
        results = tuple(next(scores) if fault is None else fault for fault in faults)
        self._count(tenant, request, results)
        return ScoreResponse(
            request_id=request.request_id,
            model_fingerprint=self._backend.model_fingerprint,
            weight_version=self._backend.weight_version if version is None else version,
            results=results,
        )

    def render_metrics(self) -> bytes:
        """Update the gauges and return Prometheus text."""
        if self._scheduler is not None:
            cache = self._scheduler.cache
            self.metrics.queued_tokens.set(self._scheduler.queue.tokens)
            self.metrics.cache_bytes.set(cache.nbytes)
            self.metrics.cache_host_bytes.set(cache.host_nbytes)
            self.metrics.cache_hits.set(cache.counts.hits)
            self.metrics.cache_misses.set(cache.counts.misses)
            self.metrics.cache_evictions.set(cache.counts.evictions)
            self.metrics.cache_restored.set(cache.counts.restored)
        return self.metrics.render()

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise RequestRefused(503, "broken", self._broken)

    def _find_contexts(
        self, tenant: str, request: ScoreRequest, scheduler: Scheduler
    ) -> dict[str, ContextRef | ItemError]:
        """The contexts that the items name, or the fault of all items under one."""
        found: dict[str, ContextRef | ItemError] = {}
        for name in {item.context for item in request.items if item.context is not None}:
            context = self.contexts.get(tenant, name)
            if context is None:
                found[name] = ItemError(
                    "unknown_context", f"context {name} is not stored (never put, or evicted): put the context again"
                )
                continue
            ref = ContextRef(tenant, context, self.contexts.parents(tenant, context))
            found[name] = ref
            if not scheduler.cache.fits(ref):
                found[name] = ItemError(
                    "too_long",
                    f"the state of a context of {context.ids.size} tokens takes more than "
                    f"teacher.context_cache_bytes={self._config.context_cache_bytes}",
                )
        return found

    def _prepare(
        self, request: ScoreRequest, contexts: Mapping[str, ContextRef | ItemError]
    ) -> tuple[list[ItemError | None], list[tuple[Work, ContextRef | None]]]:
        """Return a fault or None for each item, and the work of the items without a fault. Thread-safe."""
        info = self.info()
        check_request(request, info)
        faults: list[ItemError | None] = []
        works: list[tuple[Work, ContextRef | None]] = []
        for item in request.items:
            context = None if item.context is None else contexts[item.context]
            if isinstance(context, ItemError):
                faults.append(context)
                continue
            fault = check_item(item, None if context is None else context.context, request, info, self._backend)
            faults.append(fault)
            if fault is None:
                works.append((Work(item, None, request.mode, request.temperature, request.k), context))
        return faults, works

    def _observe(self, report: BatchReport) -> None:
        self.tracing.record_batch(report)
        metrics = self.metrics
        requested: dict[str, int] = {}
        metrics.batch_items.observe(len(report.jobs))
        metrics.batch_tokens.observe(report.own_tokens)
        metrics.batch_s.observe(report.seconds)
        for job in report.jobs:
            label = metrics.run(job.submission.tenant, job.submission.run)
            metrics.queue_s.labels(label).observe(report.began - job.submission.queued_at)
            metrics.tokens_computed.labels(label).inc(job.work.own_tokens)
            if job.context is not None:
                requested[label] = requested.get(label, 0) + int(job.context.context.ids.size)
        computed = {metrics.run(*account): tokens for account, tokens in report.context_tokens.items()}
        for label, tokens in requested.items():
            metrics.context_computed.labels(label).inc(computed.get(label, 0))
            metrics.context_saved.labels(label).inc(max(0, tokens - computed.get(label, 0)))

    def _count(self, tenant: str, request: ScoreRequest, results: Sequence[ItemScore | ItemError]) -> None:
        label = self.metrics.run(tenant, request.run)
        scores = [result for result in results if isinstance(result, ItemScore)]
        self.metrics.tokens_scored.labels(label).inc(sum(score.sampled_logprob.size for score in scores))
        self.metrics.floored.labels(label).inc(sum(score.floored for score in scores))
        for code, count in Counter(result.code for result in results if isinstance(result, ItemError)).items():
            self.metrics.rejected.labels(label, code).inc(count)


def _shutting_down() -> RequestRefused:
    return RequestRefused(503, "draining", "this teacher is shutting down: connect again", retry_after_s=1.0)


async def _score_with_one_version(
    scheduler: Scheduler, tenant: str, run: str, works: Sequence[tuple[Work, ContextRef | None]]
) -> tuple[list[ItemScore | ItemError], int | None]:
    """Score all items with one weight version and return that version; None if there are no items.

    Items that were scored before a weight update are scored again.
    """
    results: list[ItemScore | ItemError | None] = [None] * len(works)
    versions = [-1] * len(works)
    outdated = list(range(len(works)))
    while outdated:
        scored = await scheduler.submit(tenant, run, [works[index] for index in outdated])
        for index, (result, version) in zip(outdated, scored, strict=True):
            results[index], versions[index] = result, version
        newest = max(versions)
        outdated = [index for index, version in enumerate(versions) if version < newest]
    return [result for result in results if result is not None], max(versions, default=None)
