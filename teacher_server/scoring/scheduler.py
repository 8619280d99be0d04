"""Requests to batches: a bounded fair queue on the event loop, and one worker thread that computes.

The loop takes items in fair order up to a token budget and hands them to the thread. The next batch gathers meanwhile.
A batch may mix tenants and contexts: the backend packs the items together.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from opentelemetry.trace import Span, get_current_span

from common.protocol.fields import shown
from common.protocol.schema import ItemError, ItemScore
from teacher_server.backends.base import Backend, BackendLost, Work
from teacher_server.scoring.batch_size import BatchSizer
from teacher_server.scoring.contexts import ContextRef, Name
from teacher_server.scoring.fair_queue import FairQueue, Ticket
from teacher_server.scoring.prefix_cache import CacheFull, PrefixCache

log = logging.getLogger(__name__)

RUN_SHARE = 0.25
"""Part of the queue that one run may fill with more than one request."""

TENANT_SHARE = 0.5
"""Part of the queue that one tenant may fill with more than one request."""


MAX_RESTARTS = 10
"""Restarts of the model's process within `RESTARTS_S`. One more death ends the batch loop: it is not one bad item."""

RESTARTS_S = 3600.0

MAX_DEADLY_ITEMS = 3
"""Items of one tenant that may each end the model's process within `RESTARTS_S`. The tenant is refused afterwards, so
that its next ones do not end the server for all."""

SLICE_ITEMS = 128
"""Items that enter the queue before other work of the event loop has its turn."""


class QueueFull(RuntimeError):
    """The queue has no room. Try again after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class SchedulerStopped(RuntimeError):
    """The batch loop failed. Nothing is scored until the server restarts."""


Versioned = tuple[ItemScore | ItemError, int]
"""A result and the weight version that computed it."""


@dataclass(slots=True, eq=False)
class Submission:
    """The items that one caller waits for."""

    tenant: str
    run: str
    results: list[Versioned | None]
    done: asyncio.Future[None]
    """Set with the last result, or with the fault that ends the batch loop; cancelled with its caller."""
    queued_at: float = field(default_factory=time.monotonic)
    span: Span = field(default_factory=get_current_span)
    """Span of the request that the items belong to."""
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.results)

    def set(self, index: int, result: Versioned) -> None:
        """Keep the result of item `index`."""
        self.results[index] = result
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the wait with `error`."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One queued item. The worker thread fills in `work.prefix`."""

    submission: Submission
    index: int
    work: Work
    context: ContextRef | None


@dataclass(frozen=True, slots=True)
class BatchReport:
    """One computed batch, for the metrics and the speed estimate.

    `context_tokens`: tokens computed for contexts, by the (tenant, run) of the first item that needs each context; of
    every item that needs it, with a backend that computes it again for each (path `full`).
    """

    jobs: Sequence[Job]
    began: float
    seconds: float
    context_tokens: dict[tuple[str, str], int]

    @property
    def own_tokens(self) -> int:
        """Prompt and response tokens of the batch."""
        return sum(job.work.own_tokens for job in self.jobs)


class Scheduler:
    """Owns the queue, the worker thread and the cache of context states."""

    def __init__(
        self,
        backend: Backend,
        *,
        batch_tokens: int,
        batch_items: int | None = None,
        window_s: float,
        max_queued_tokens: int,
        context_cache_bytes: int,
        context_host_bytes: int = 0,
        thread_setup: Callable[[], None] | None = None,
        on_batch: Callable[[BatchReport], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_failure` is called once, on the event loop, with `failure` as its argument."""
        self._backend = backend
        self._recomputes = backend.path == "full"
        self._batch_items = batch_items
        self._window_s = window_s
        self._max_queued = max_queued_tokens
        self.cache = PrefixCache(backend, context_cache_bytes, context_host_bytes)
        self.queue: FairQueue[Job] = FairQueue()
        self._sizer = BatchSizer(batch_tokens)
        self._arrived = asyncio.Event()
        self._waiting_since = 0.0
        self._thread = ThreadPoolExecutor(1, "teacher", initializer=thread_setup or (lambda: None))
        self._loop_task: asyncio.Task[None] | None = None
        self._stopping = False
        self._running: list[Job] = []
        self.failure: str | None = None
        """The fault that ended the batch loop."""
        self._on_batch = on_batch
        self._on_failure = on_failure

        self._restarts: list[float] = []
        """Times of the last restarts of the backend."""
        self._deadly: set[bytes] = set()
        """Fingerprints of the items that ended the model's process; `MAX_RESTARTS` bounds how fast they grow."""
        self._deaths: defaultdict[str, list[float]] = defaultdict(list)
        """Times at which an item of a tenant ended the model's process."""

    # --- on the event loop ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the batch loop on the running event loop, which must also call `submit`."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run(), name="teacher-batches")
        self._loop_task.add_done_callback(self._fail_waiting)

    async def stop(self) -> None:
        """Finish the queued items, then stop."""
        self._stopping = True
        self._arrived.set()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
        self._thread.shutdown(wait=True)

    async def submit(self, tenant: str, run: str, works: Sequence[tuple[Work, ContextRef | None]]) -> list[Versioned]:
        """Queue items and wait for all results. Items of a cancelled caller leave the queue.

        Raises QueueFull and SchedulerStopped.
        """
        if self.failure is not None:
            raise SchedulerStopped(self.failure)
        self._admit(tenant, run, sum(work.queue_tokens for work, _ in works))
        self._sizer.record_request(tenant, run)
        if not works:
            return []
        if not self.queue.tokens:
            self._waiting_since = time.monotonic()
        submission = Submission(tenant, run, [None] * len(works), asyncio.get_running_loop().create_future())
        tickets: list[Ticket] = []
        try:
            for index, (work, context) in enumerate(works):
                if index % SLICE_ITEMS == 0 and index:
                    await asyncio.sleep(0)
                tickets.append(self.queue.push(tenant, run, Job(submission, index, work, context), work.queue_tokens))
                self._arrived.set()
            await submission.done
        finally:
            if submission.missing:
                submission.done.cancel()
                self.queue.discard(tickets)
        return [result for result in submission.results if result is not None]

    def _admit(self, tenant: str, run: str, tokens: int) -> None:
        run_tokens, tenant_tokens = self.queue.waiting_tokens(tenant, run), self.queue.waiting_tokens(tenant)
        full = (
            self.queue.tokens + tokens > self._max_queued
            or (run_tokens and run_tokens + tokens > RUN_SHARE * self._max_queued)
            or (tenant_tokens and tenant_tokens + tokens > TENANT_SHARE * self._max_queued)
        )
        # An empty queue takes any request: an item larger than the queue must be admitted at some time. The service
        # limits a request of several items to a run's share.
        if full and self.queue.tokens:
            raise QueueFull(retry_after_s=min(60.0, max(0.1, self.queue.tokens / self._sizer.tokens_per_s / 2)))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while await self._wait_for_work():
            jobs = self._take()
            if not jobs:
                continue
            self._running = jobs
            report, results, version = await loop.run_in_executor(self._thread, self._compute_one_version, jobs)
            # Contexts that each item computes again count in no batch's budget, so the speed is that of own tokens.
            ahead = 0 if self._recomputes else sum(report.context_tokens.values())
            self._sizer.record_batch(report.own_tokens + ahead, report.seconds)
            for (tenant, _), tokens in report.context_tokens.items():
                self.queue.charge(tenant, tokens)
            self._on_batch(report)
            for job, result in zip(jobs, results, strict=True):
                job.submission.set(job.index, (result, version))
            self._running = []

    def _fail_waiting(self, task: asyncio.Task[None]) -> None:
        """Fail every waiting job if the batch loop ended by a fault: their callers would wait without end."""
        fault = asyncio.CancelledError() if task.cancelled() else task.exception()
        if fault is None:
            return
        log.critical("the batch loop failed: nothing is scored until the server restarts", exc_info=fault)
        self.failure = f"the batch loop failed: {type(fault).__name__} {fault}".rstrip()
        while (job := self.queue.pop()) is not None:
            self._running.append(job)
        for job in self._running:
            job.submission.fail(SchedulerStopped(self.failure))
        self._on_failure(self.failure)

    async def _wait_for_work(self) -> bool:
        """Wait for an item, then a short window for more unless a batch is full. False: stop."""
        while not self.queue.tokens:
            if self._stopping:
                return False
            self._arrived.clear()
            await self._arrived.wait()
        deadline = self._waiting_since + self._window_s
        while self.queue.tokens < self._budget and (left := deadline - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                break
        return True

    @property
    def _budget(self) -> int:
        return self._sizer.tokens(self.queue.waiting_runs)

    def _take(self) -> list[Job]:
        """The next batch: at least one item, then as many as the budget holds, missing contexts included."""
        jobs: list[Job] = []
        missing: set[Name] = set()
        left = self._budget

        def cost(job: Job) -> int:
            ref = job.context
            if ref is None or ref.name in missing or self.cache.holds(ref):
                return job.work.queue_tokens
            return job.work.queue_tokens + int(ref.context.ids.size)

        def fits(job: Job) -> bool:
            return not jobs or cost(job) <= left

        while len(jobs) != self._batch_items and (job := self.queue.pop(fits)) is not None:
            if job.submission.done.done():
                continue
            left -= cost(job)
            jobs.append(job)
            if job.context is not None:
                missing.add(job.context.name)
        return jobs

    def between_batches(self, call: Callable[[], None]) -> Future[None]:
        """Run `call` on the worker thread between two batches, then drop outdated context states. Thread-safe."""

        def alone() -> None:
            call()
            self.cache.drop_other_versions()

        return self._thread.submit(alone)

    # --- on the worker thread ---------------------------------------------------------------------------------------

    def _compute_one_version(self, jobs: list[Job]) -> tuple[BatchReport, list[ItemScore | ItemError], int]:
        version = self._backend.weight_version  # changes on this thread only
        report, results = self._compute_safely(jobs)
        return report, results, version

    def _compute_safely(self, jobs: list[Job]) -> tuple[BatchReport, list[ItemScore | ItemError]]:
        """Score a batch. If that fails, score item by item: a bad item fails alone and the server lives on.

        An item during which the model's process dies is refused from then on. Raises BackendLost above `MAX_RESTARTS`.
        """
        deadly = [reason for job in jobs if (reason := self._deadly_reason(job)) is not None]
        if len(jobs) == len(deadly):
            return _failed(jobs, deadly[0])
        try:
            if not deadly:
                return self._compute(jobs)
        except BackendLost as error:
            self._restart(error)
            if len(jobs) == 1:
                self._deadly.add(_fingerprint(jobs[0]))
                self._deaths[jobs[0].submission.tenant].append(time.monotonic())
                return _failed(jobs, "the model's process died of this item")
        except Exception as error:
            runs = sorted({f"{job.submission.tenant}/{shown(job.submission.run)}" for job in jobs})
            log.exception("a batch of %d items failed (%s)", len(jobs), ", ".join(runs[:10]))
            if len(jobs) == 1:
                return _failed(jobs, f"the backend failed: {type(error).__name__}")
        began = time.monotonic()
        results = [self._compute_safely([job])[1][0] for job in jobs]
        return BatchReport(jobs, began, time.monotonic() - began, {}), results

    def _deadly_reason(self, job: Job) -> str | None:
        """The reason to keep an item from the model's process; None if there is none."""
        if self._deadly and _fingerprint(job) in self._deadly:
            return "the model's process died of this item before"
        deaths = self._deaths.get(job.submission.tenant, ())
        if sum(time.monotonic() - at < RESTARTS_S for at in deaths) >= MAX_DEADLY_ITEMS:
            return f"the model's process died of {MAX_DEADLY_ITEMS} items of this tenant within an hour"
        return None

    def _restart(self, error: BackendLost) -> None:
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if now - at < RESTARTS_S]
        if len(self._restarts) >= MAX_RESTARTS:
            raise error
        self._restarts.append(now)
        log.error("%s: starting it again", error)
        self._backend.restart()
        self.cache.clear()

    def _compute(self, jobs: list[Job]) -> tuple[BatchReport, list[ItemScore | ItemError]]:
        """Score a batch, in several passes if its contexts do not fit into the cache together."""
        began = time.monotonic()
        context_tokens: dict[tuple[str, str], int] = {}
        results: list[ItemScore | ItemError] = []
        while len(results) < len(jobs):
            with self.cache.pinned() as pins:
                works: list[Work] = []
                for job in jobs[len(results) :]:
                    before = self.cache.counts.computed_tokens
                    try:
                        prefix = None if job.context is None else pins.state(job.context)
                    except CacheFull:
                        if not works:
                            raise
                        break
                    works.append(replace(job.work, prefix=prefix))
                    computed = self.cache.counts.computed_tokens - before
                    if self._recomputes and job.context is not None:
                        computed = int(job.context.context.ids.size)
                    if computed:
                        account = (job.submission.tenant, job.submission.run)
                        context_tokens[account] = context_tokens.get(account, 0) + computed
                scored = self._backend.score(works)
                if len(scored) != len(works):  # every score behind the gap would belong to another item
                    raise RuntimeError(f"the backend got {len(works)} items and returned {len(scored)} results")
                results += scored
        return BatchReport(jobs, began, time.monotonic() - began, context_tokens), results


def _failed(jobs: list[Job], message: str) -> tuple[BatchReport, list[ItemScore | ItemError]]:
    failed: list[ItemScore | ItemError] = [ItemError(code="internal", message=message) for _ in jobs]
    return BatchReport(jobs, time.monotonic(), 0.0, {}), failed


def _fingerprint(job: Job) -> bytes:
    """Digest of all that the model's process gets of an item."""
    work, item = job.work, job.work.item
    context = "" if job.context is None else job.context.context.hash
    digest = hashlib.sha256(f"{context} {work.mode} {work.temperature} {work.k}".encode())
    for ids in (item.prompt_ids, item.response_ids, item.topk_ids):
        digest.update(b"|" if ids is None else repr(ids.shape).encode() + ids.tobytes())
    return digest.digest()
