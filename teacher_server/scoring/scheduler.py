"""Requests to batches: a bounded fair queue on the event loop, one worker thread that computes.

The loop picks items by fairness up to a budget of own tokens and hands them to the thread; while a batch runs the next
one gathers. Items of a batch may come from any tenant and context: the backend packs them side by side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from common.protocol.schema import ItemError, ItemScore
from teacher_server.backends.base import Backend, BackendLost, Work
from teacher_server.scoring.contexts import CacheFull, ContextRef, PrefixCache
from teacher_server.scoring.fair_queue import FairQueue

log = logging.getLogger(__name__)

RUN_SHARE = 0.25
TENANT_SHARE = 0.5
"""Of the queue that one run, and one tenant, may fill while it has other work waiting: the rest stays for others."""


ALONE_BATCH_S = 2.0
"""About how long a batch may take while there is one run: cut shorter, it would only read the weights more often."""

BATCH_S = 0.5
"""The same where another run asked within `LATELY_S`: who comes while one runs waits for it, and for one more."""

SHARED_BATCH_S = 0.15
"""The same while several runs wait: a quiet one among loud ones then waits little longer than it computes."""

LATELY_S = 60.0
"""For how long after its last request a run is reckoned with."""

LEAST_BATCH_TOKENS = 128
"""Of a batch however slow the model is: smaller ones only read the weights more often."""


class QueueFull(RuntimeError):
    """No room: try again after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class SchedulerStopped(RuntimeError):
    """The loop that makes batches ended by a fault: nothing is computed any more, the server must be started again."""


Versioned = tuple[ItemScore | ItemError, int]
"""A result and the version of the weights that it was computed with."""


@dataclass(slots=True, eq=False)
class Job:
    """One item on its way: `work.prefix` is filled in by the thread."""

    tenant: str
    run: str
    work: Work
    located: ContextRef | None
    future: asyncio.Future[Versioned]
    queued_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch was: for metrics, for accounting and for the estimate of Retry-After.

    `context_tokens` were computed for contexts, by (tenant, run) of the item that needed them first.
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
    """Owns the queue, the thread and the cache of context states."""

    def __init__(
        self,
        backend: Backend,
        *,
        batch_tokens: int,
        batch_items: int | None = None,
        window_s: float,
        max_queued_tokens: int,
        context_cache_bytes: int,
        thread_setup: Callable[[], None] | None = None,
        on_batch: Callable[[BatchReport], None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_failure` is called once, on the event loop, where no batches are made any more: with `failure`."""
        self._backend = backend
        self._batch_tokens = batch_tokens
        self._batch_items = batch_items
        self._window_s = window_s
        self._max_queued = max_queued_tokens
        self.cache = PrefixCache(backend, context_cache_bytes)
        self.queue: FairQueue[Job] = FairQueue()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "teacher", initializer=thread_setup or (lambda: None))
        self._loop_task: asyncio.Task[None] | None = None
        self._tokens_per_s = 1000.0
        self._asked_at: dict[tuple[str, str], float] = {}
        self._stopping = False
        self._running: list[Job] = []
        self.failure: str | None = None
        """Why no batches are made any more."""
        self._on_batch = on_batch
        self._on_failure = on_failure

    # --- on the event loop ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin taking batches; called on the event loop that will call `submit`."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run(), name="teacher-batches")
        self._loop_task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Finish what is queued, then stop."""
        self._stopping = True
        self._arrived.set()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
        self._thread.shutdown(wait=True)

    async def submit(self, tenant: str, run: str, works: Sequence[tuple[Work, ContextRef | None]]) -> list[Versioned]:
        """Queue items and wait for all of them. Raises QueueFull and SchedulerStopped; a cancelled caller's items leave
        the queue.
        """
        if self.failure is not None:
            raise SchedulerStopped(self.failure)
        tokens = sum(work.own_tokens for work, _ in works)
        self._admit(tenant, run, tokens)
        self._asked_at.pop((tenant, run), None)  # to the end: the oldest comes first
        self._asked_at[tenant, run] = time.monotonic()
        self._runs_lately()  # names come from clients: none is kept for longer than it counts
        loop = asyncio.get_running_loop()
        jobs = [Job(tenant, run, work, located, loop.create_future()) for work, located in works]
        for job in jobs:
            self.queue.push(tenant, run, job, job.work.own_tokens)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(job.future for job in jobs)))
        finally:
            self.queue.discard(tenant, run, [job for job in jobs if not job.future.done() or job.future.cancelled()])

    def _admit(self, tenant: str, run: str, tokens: int) -> None:
        own, team = self.queue.waiting_tokens(tenant, run), self.queue.waiting_tokens(tenant)
        full = (
            self.queue.tokens + tokens > self._max_queued
            or (own and own + tokens > RUN_SHARE * self._max_queued)
            or (team and team + tokens > TENANT_SHARE * self._max_queued)
        )
        # An item larger than the whole queue could never be admitted otherwise. (Of several items, a request has at
        # most a run's share: the service refuses others.)
        if full and self.queue:
            raise QueueFull(retry_after_s=min(60.0, max(0.1, self.queue.tokens / self._tokens_per_s / 2)))

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while await self._wait_for_work():
            jobs = self._take()
            if not jobs:
                continue
            self._running = jobs
            report, results, version = await loop.run_in_executor(self._thread, self._compute_one_version, jobs)
            self._account(report)
            for job, result in zip(jobs, results, strict=True):
                if not job.future.done():
                    job.future.set_result((result, version))
            self._running = []

    @property
    def running_items(self) -> int:
        """Items of the batch that is being computed."""
        return len(self._running)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Whoever waits hears of a loop that ended by a fault: else they would wait for ever."""
        fault = asyncio.CancelledError() if task.cancelled() else task.exception()
        if fault is None:
            return
        log.critical("no batches are made any more", exc_info=fault)
        self.failure = f"no batches are made any more: {type(fault).__name__} {fault}".rstrip()
        waiting = [self.queue.pop() for _ in range(len(self.queue))]
        for job in [*self._running, *waiting]:
            if not job.future.done():
                job.future.set_exception(SchedulerStopped(self.failure))
        self._on_failure(self.failure)

    async def _wait_for_work(self) -> bool:
        """Until something waits, then a short window for more, unless a full batch is there already; False: stop."""
        while not self.queue:
            if self._stopping:
                return False
            self._arrived.clear()
            await self._arrived.wait()
        if self.queue.tokens >= self._budget:
            return True
        deadline = min(job.queued_at for job in self.queue) + self._window_s
        while self.queue.tokens < self._budget and (left := deadline - time.monotonic()) > 0:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                break
        return True

    @property
    def _budget(self) -> int:
        """Tokens of the next batch: the configured bound, or what the measured speed does in the time it may take."""
        if self.queue.waiting_runs > 1:
            seconds = SHARED_BATCH_S
        else:
            seconds = BATCH_S if self._runs_lately() > 1 else ALONE_BATCH_S
        return min(self._batch_tokens, max(LEAST_BATCH_TOKENS, int(self._tokens_per_s * seconds)))

    def _runs_lately(self) -> int:
        """Runs that asked within `LATELY_S`; forgets the others."""
        since = time.monotonic() - LATELY_S
        while self._asked_at and (oldest := next(iter(self._asked_at.items())))[1] < since:
            del self._asked_at[oldest[0]]
        return len(self._asked_at)

    def _take(self) -> list[Job]:
        """The next batch: at least one item, then as many as the budget holds, contexts to be computed included."""
        jobs: list[Job] = []
        tokens = 0
        new: set[tuple[str, str]] = set()
        budget = self._budget
        while self.queue and (not jobs or tokens + self.queue.peek_tokens() <= budget):
            if len(jobs) == self._batch_items:
                break
            job = self.queue.pop()
            if job.future.done():
                continue
            jobs.append(job)
            tokens += job.work.own_tokens
            if job.located is not None and job.located.name not in new and not self.cache.holds(job.located):
                new.add(job.located.name)
                tokens += int(job.located.context.ids.size)
        return jobs

    def _account(self, report: BatchReport) -> None:
        for (tenant, run), tokens in report.context_tokens.items():
            self.queue.charge(tenant, run, tokens)
        spent = report.own_tokens + sum(report.context_tokens.values())
        if report.seconds > 0 and spent:
            self._tokens_per_s += 0.2 * (spent / report.seconds - self._tokens_per_s)
        self._on_batch(report)

    def between_batches(self, call: Callable[[], None]) -> Future[None]:
        """Do `call` on the thread that computes, when no batch does; from any thread. States of contexts that it leaves
        out of date are dropped.
        """

        def alone() -> None:
            call()
            self.cache.drop_other_versions()

        return self._thread.submit(alone)

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _compute_one_version(self, jobs: list[Job]) -> tuple[BatchReport, list[ItemScore | ItemError], int]:
        version = self._backend.weight_version  # changes on this thread only
        report, results = self._compute_safely(jobs)
        return report, results, version

    def _compute_safely(self, jobs: list[Job]) -> tuple[BatchReport, list[ItemScore | ItemError]]:
        """A batch that fails is tried item by item: one bad item must not take its neighbours, or the server, along."""
        try:
            return self._compute(jobs)
        except BackendLost:
            raise
        except Exception as error:
            log.exception("a batch of %d items failed", len(jobs))
            if len(jobs) == 1:
                failed = ItemError(code="internal", message=f"the backend failed: {type(error).__name__}")
                return BatchReport(jobs, time.monotonic(), 0.0, {}), [failed]
        began = time.monotonic()
        results = [self._compute_safely([job])[1][0] for job in jobs]
        return BatchReport(jobs, began, time.monotonic() - began, {}), results

    def _compute(self, jobs: list[Job]) -> tuple[BatchReport, list[ItemScore | ItemError]]:
        """Score a batch, in several passes where its contexts do not fit into the cache together."""
        began = time.monotonic()
        context_tokens: dict[tuple[str, str], int] = {}
        results: list[ItemScore | ItemError] = []
        while len(results) < len(jobs):
            with self.cache.pinned() as pins:
                works: list[Work] = []
                for job in jobs[len(results) :]:
                    before = self.cache.counts.computed_tokens
                    try:
                        prefix = None if job.located is None else pins.state(job.located)
                    except CacheFull:
                        if not works:
                            raise
                        break
                    works.append(replace(job.work, prefix=prefix))
                    spent = self.cache.counts.computed_tokens - before
                    if spent:
                        account = (job.tenant, job.run)
                        context_tokens[account] = context_tokens.get(account, 0) + spent
                scored = self._backend.score(works)
                if len(scored) != len(works):  # else every score behind the gap would be another item's
                    raise RuntimeError(f"{len(works)} items went to the backend, {len(scored)} results came back")
                results += scored
        return BatchReport(jobs, began, time.monotonic() - began, context_tokens), results
