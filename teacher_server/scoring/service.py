"""What the server does, without HTTP: look up, check, queue, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.config.model import TeacherConfig
from common.protocol.schema import (
    PROTOCOL_VERSION,
    Context,
    Ids,
    ItemError,
    ItemScore,
    ScoreItem,
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

CONTEXT_IDS_BYTES = 256 * 1024 * 1024
"""Bound on the tokens of stored contexts (their states have a bound of their own)."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """Fingerprints of the tokenizer that goes with the model."""

    tokenizer: str
    chat_template: str


class TeacherService:
    """One model, its contexts and its queue. `start` and `stop` on the event loop that uses it."""

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
        """`thread_setup` runs in the thread that computes, `on_stop` after it has ended; `on_failure` is called with
        the reason when nothing is computed any more.
        """
        self._backend = backend
        self._config = config
        self._identity = identity
        self._longest = min(config.max_sequence_tokens or backend.max_sequence_tokens, backend.max_sequence_tokens)
        self._thread_setup = thread_setup
        self._on_stop = on_stop
        self._on_failure = on_failure
        self._scheduler: Scheduler | None = None
        self._draining = False
        self._broken: str | None = None
        self.contexts = ContextStore(identity.tokenizer, max_tokens=self._longest, max_bytes=CONTEXT_IDS_BYTES)
        self.metrics = Metrics()

    def start(self) -> None:
        """Begin to take requests."""
        self._scheduler = Scheduler(
            self._backend,
            batch_tokens=self._config.batch_tokens,
            batch_items=self._config.batch_items,
            window_s=self._config.batch_window_ms / 1000,
            max_queued_tokens=self._config.max_queued_tokens,
            context_cache_bytes=self._config.context_cache_bytes,
            thread_setup=self._thread_setup,
            on_batch=self._observe,
            on_failure=self._on_failure,
        )
        self._scheduler.start()

    async def stop(self) -> None:
        """Take nothing more, finish what is queued."""
        self.drain()
        if self._scheduler is not None:
            await self._scheduler.stop()
        if self._on_stop is not None:
            await asyncio.to_thread(self._on_stop)

    def drain(self) -> None:
        """Refuse new requests from here on; from any thread."""
        self._draining = True

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._scheduler is not None and self.alive and not self._draining and self._broken is None

    @property
    def alive(self) -> bool:
        """False where only another process can help."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """Why nothing is computed any more; None: it is."""
        return None if self._scheduler is None else self._scheduler.failure

    def load_weights(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Replace the weights between two batches; from any thread but the event loop's, blocks until it is done.

        Raises SyncError; nothing is scored any more then, since the weights are a mixture.
        """
        self._change(
            lambda backend: backend.load_weights(tensors, version), f"weights of version {version} did not arrive whole"
        )

    @property
    def device(self) -> Any:
        """Where the model's weights are to arrive."""
        return cast(LiveBackend, self._backend).device

    def save_state(self, path: Path) -> None:
        """What a resumed run needs of a teacher that averages, as one file."""
        self._between_batches(lambda backend: backend.save_state(path))

    def load_state(self, path: Path) -> None:
        """Go on from `save_state`; nothing is scored any more where that fails."""
        self._change(lambda backend: backend.load_state(path), f"the average in {path} was not read whole")

    def _change(self, call: Callable[[LiveBackend], None], fault: str) -> None:
        def change(backend: LiveBackend) -> None:
            try:
                call(backend)
            except BaseException as error:
                # Here and not where it is waited for: the next batch may be in this thread's queue already.
                self._broken = f"{fault}: {error}"
                raise

        self._between_batches(change)

    def _between_batches(self, call: Callable[[LiveBackend], None]) -> None:
        if self._scheduler is None:
            raise SyncError("the teacher takes weights only after its server has started")
        backend = cast(LiveBackend, self._backend)
        self._scheduler.between_batches(lambda: call(backend)).result()

    def info(self) -> TeacherInfo:
        """The handshake."""
        backend, config = self._backend, self._config
        assert config.kind != "base"  # the learner itself
        return TeacherInfo(
            protocol=PROTOCOL_VERSION,
            model=backend.model_name,
            model_fingerprint=backend.model_fingerprint,
            tokenizer_fingerprint=self._identity.tokenizer,
            chat_template_fingerprint=self._identity.chat_template,
            backend=backend.name,
            dtype=backend.dtype,
            vocab_size=backend.vocab_size,
            max_k=min(config.max_k, backend.vocab_size),
            max_sequence_tokens=self._longest,
            max_items=config.max_items,
            max_body_bytes=config.max_body_bytes,
            max_request_tokens=max(1, int(RUN_SHARE * config.max_queued_tokens)),
            modes=dict(backend.modes),
            kind=config.kind,
            weight_version=backend.weight_version,
        )

    def put_context(self, tenant: str, name: str, ids: Ids, parent: str | None) -> Context:
        """Store a context; raises RequestRefused."""
        if self._draining:
            raise _shutting_down()
        try:
            return self.contexts.put(tenant, name, ids, parent)
        except ContextRefused as error:
            status = 404 if error.code == "unknown_parent" else 422
            raise RequestRefused(status, error.code, str(error)) from error

    def check(self, request: ScoreRequest) -> TeacherInfo:
        """Whether a request can be answered here, by the bounds of this handshake; raises RequestRefused."""
        info = self.info()
        check_request(request, info)
        return info

    async def score(self, tenant: str, request: ScoreRequest, *, deadline_s: float | None = None) -> ScoreResponse:
        """Score the items that can be scored, say of the others why not; raises RequestRefused for the whole.

        After `deadline_s` the items leave the queue and the request is refused: nobody waits for it any more.
        """
        scheduler = self._scheduler
        self._refuse_if_broken()
        if scheduler is None or self._draining:
            raise _shutting_down()
        info = self.check(request)
        faults, works = self._prepare(tenant, request, info, scheduler)
        try:
            async with asyncio.timeout(deadline_s):
                scored, version = await _of_one_version(scheduler, tenant, request.run, works)
        except QueueFull as error:
            raise RequestRefused(429, "busy", str(error), retry_after_s=error.retry_after_s) from error
        except SchedulerStopped as error:
            raise RequestRefused(503, "broken", str(error)) from error
        except TimeoutError as error:
            raise RequestRefused(504, "deadline", f"not scored within the {deadline_s:g} s asked for") from error
        self._refuse_if_broken()  # an update may have failed while these items waited
        in_order = iter(scored)
        results = tuple(next(in_order) if fault is None else fault for fault in faults)
        self._count(tenant, request, results)
        return ScoreResponse(
            request_id=request.request_id,
            model_fingerprint=self._backend.model_fingerprint,
            weight_version=self._backend.weight_version if version is None else version,
            results=results,
        )

    def render_metrics(self) -> bytes:
        """Prometheus text, gauges brought up to date."""
        if self._scheduler is not None:
            cache = self._scheduler.cache
            self.metrics.queued_tokens.set(self._scheduler.queue.tokens)
            self.metrics.cache_bytes.set(cache.nbytes)
            self.metrics.cache_hits.set(cache.counts.hits)
            self.metrics.cache_misses.set(cache.counts.misses)
            self.metrics.cache_evictions.set(cache.counts.evictions)
        return self.metrics.render()

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise RequestRefused(503, "broken", self._broken)

    def _prepare(
        self, tenant: str, request: ScoreRequest, info: TeacherInfo, scheduler: Scheduler
    ) -> tuple[list[ItemError | None], list[tuple[Work, ContextRef | None]]]:
        """Per item its fault or None; the work of those without one."""
        faults: list[ItemError | None] = []
        works: list[tuple[Work, ContextRef | None]] = []
        for item in request.items:
            located = self._locate(tenant, item)
            context = None if located is None else located.context
            fault = check_item(item, context, request, info, self._backend)
            if fault is None and located is not None and not scheduler.cache.fits(located):
                fault = ItemError(
                    "too_long",
                    f"the cache of a context of {located.context.ids.size} tokens takes more than "
                    f"teacher.context_cache_bytes={self._config.context_cache_bytes}",
                )
            faults.append(fault)
            if fault is None:
                works.append((Work(item, None, request.mode, request.temperature, request.k), located))
        return faults, works

    def _locate(self, tenant: str, item: ScoreItem) -> ContextRef | None:
        context = None if item.context is None else self.contexts.get(tenant, item.context)
        return None if context is None else ContextRef(tenant, context, self.contexts.parents(tenant, context))

    def _observe(self, report: BatchReport) -> None:
        metrics = self.metrics
        needed: dict[str, int] = {}
        metrics.batch_items.observe(len(report.jobs))
        metrics.batch_tokens.observe(report.own_tokens)
        metrics.batch_s.observe(report.seconds)
        for job in report.jobs:
            label = metrics.run(job.tenant, job.run)
            metrics.queue_s.labels(label).observe(report.began - job.queued_at)
            metrics.tokens_computed.labels(label).inc(job.work.own_tokens)
            if job.located is not None:
                needed[label] = needed.get(label, 0) + int(job.located.context.ids.size)
        computed = {metrics.run(*account): tokens for account, tokens in report.context_tokens.items()}
        for label, tokens in needed.items():
            metrics.context_computed.labels(label).inc(computed.get(label, 0))
            metrics.context_saved.labels(label).inc(max(0, tokens - computed.get(label, 0)))

    def _count(self, tenant: str, request: ScoreRequest, results: Sequence[ItemScore | ItemError]) -> None:
        label = self.metrics.run(tenant, request.run)
        for result in results:
            if isinstance(result, ItemError):
                self.metrics.rejected.labels(label, result.code).inc()
            else:
                self.metrics.tokens_scored.labels(label).inc(result.sampled_logprob.size)
                self.metrics.floored.labels(label).inc(result.floored)


def _shutting_down() -> RequestRefused:
    return RequestRefused(503, "draining", "this teacher is shutting down: connect again", retry_after_s=1.0)


async def _of_one_version(
    scheduler: Scheduler, tenant: str, run: str, works: Sequence[tuple[Work, ContextRef | None]]
) -> tuple[list[ItemScore | ItemError], int | None]:
    """Results that were all computed with one version of the weights, and which: a reply has one stamp.

    What was computed before an update in mid-request is computed again. None where there is nothing to compute.
    """
    results: list[ItemScore | ItemError | None] = [None] * len(works)
    versions = [-1] * len(works)
    while stale := [place for place, version in enumerate(versions) if version < max(0, *versions)]:
        scored = await scheduler.submit(tenant, run, [works[place] for place in stale])
        for place, (result, version) in zip(stale, scored, strict=True):
            results[place], versions[place] = result, version
    return [result for result in results if result is not None], max(versions, default=None)
