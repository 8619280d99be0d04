"""Batches, fairness and failures of the scheduler, with a stub backend that a test can hold."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest

from common.protocol.schema import Context, Ids, ItemError, ItemScore, ScoreItem, as_ids
from teacher_server.backends.base import Backend, BackendLost, Work
from teacher_server.scoring.contexts import ContextRef
from teacher_server.scoring.scheduler import BatchReport, QueueFull, Scheduler, SchedulerStopped, Versioned


class Held:
    """A backend that answers at once while open. Records its batches."""

    weight_version = 0
    path = "shared_prefix"

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.batches: list[list[Work]] = []
        self.prefills: list[int] = []

    def prefix_bytes(self, tokens: int) -> int:
        return 10 * tokens

    def prefill(self, parts: Sequence[Ids], parent: Any) -> list[Any]:
        self.prefills += [part.size for part in parts]
        return [Prefix(int(part.size)) for part in parts]

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        self.entered.set()
        assert self.open.wait(10)
        self.batches.append(list(batch))
        if any(work.k == 13 for work in batch):
            raise RuntimeError("injected")
        nothing = np.empty(0, dtype=np.float32)
        return [ItemScore(np.empty((0, 0), dtype=np.float16), nothing, nothing, floored=work.k) for work in batch]


class Prefix:
    def __init__(self, tokens: int) -> None:
        self.total_tokens = tokens
        self.nbytes = 10 * tokens


@asynccontextmanager
async def scheduler_of(backend: Held, **settings: Any) -> AsyncIterator[Scheduler]:
    defaults = {"batch_tokens": 100, "window_s": 0.0, "max_queued_tokens": 1000, "context_cache_bytes": 1000}
    scheduler = Scheduler(cast(Backend, backend), **{**defaults, **settings})
    scheduler.start()
    try:
        yield scheduler
    finally:
        backend.open.set()
        await scheduler.stop()


def work(tokens: int, number: int = 0, context: ContextRef | None = None) -> tuple[Work, ContextRef | None]:
    item = ScoreItem(None, as_ids(np.zeros(tokens)), as_ids([]))
    return Work(item, None, "sampled", 1.0, number), context


def context(tokens: int) -> ContextRef:
    return ContextRef("t", Context(f"{tokens}", as_ids(np.zeros(tokens))))


def numbers(results: Sequence[Versioned]) -> list[object]:
    return [result.floored if isinstance(result, ItemScore) else result.code for result, _ in results]


async def hold(backend: Held, scheduler: Scheduler) -> asyncio.Task[Any]:
    """Occupy the thread with one small batch until the backend is opened."""
    backend.open.clear()
    backend.entered.clear()
    first = asyncio.create_task(scheduler.submit("t", "first", [work(1)]))
    assert await asyncio.to_thread(backend.entered.wait, 10)
    return first


async def test_batches_fill_up_to_the_budget_and_answers_keep_their_order() -> None:
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        first = await hold(backend, scheduler)
        asked = asyncio.create_task(scheduler.submit("t", "r", [work(30, n) for n in range(7)]))
        await asyncio.sleep(0.01)
        backend.open.set()
        assert numbers(await asked) == list(range(7))
        await first
    assert [len(batch) for batch in backend.batches] == [1, 3, 3, 1]


async def test_batches_of_a_slow_model_are_cut_to_half_a_second() -> None:
    backend = Held()
    async with scheduler_of(backend, batch_tokens=10_000) as scheduler:
        waiting = [await hold(backend, scheduler)]
        waiting.append(asyncio.create_task(scheduler.submit("t", "r", [work(50) for _ in range(20)])))
        await asyncio.sleep(0.3)  # one token took all of this, after a guess of 1,000 tokens/s
        backend.open.set()
        await asyncio.gather(*waiting)
    assert 2 <= len(backend.batches[1]) <= 8


async def test_items_of_a_batch_can_be_bounded() -> None:
    backend = Held()
    async with scheduler_of(backend, batch_items=1, window_s=0.05) as scheduler:
        assert numbers(await scheduler.submit("t", "r", [work(10, 1), work(10, 2), work(10, 3)])) == [1, 2, 3]
    assert [len(batch) for batch in backend.batches] == [1, 1, 1]


async def test_an_item_above_the_budget_goes_alone() -> None:
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        assert numbers(await scheduler.submit("t", "r", [work(500, 1), work(10, 2)])) == [1, 2]
    assert [len(batch) for batch in backend.batches] == [1, 1]


async def test_the_window_gathers_what_comes_close_together() -> None:
    backend = Held()
    async with scheduler_of(backend, window_s=0.2) as scheduler:
        asked = []
        for n in range(3):
            asked.append(asyncio.create_task(scheduler.submit("t", f"{n}", [work(10, n)])))
            await asyncio.sleep(0.01)
        await asyncio.gather(*asked)
    assert [len(batch) for batch in backend.batches] == [3]


async def test_a_flood_delays_a_single_request_by_one_batch() -> None:
    """Three runs fill the queue. The quiet run's request is in the next batch."""
    backend = Held()
    async with scheduler_of(backend, max_queued_tokens=100_000) as scheduler:
        first = await hold(backend, scheduler)
        floods = [
            asyncio.create_task(scheduler.submit("t", f"flood-{n}", [work(20, 1) for _ in range(500)]))
            for n in range(3)
        ]
        await asyncio.sleep(0.05)
        quiet = asyncio.create_task(scheduler.submit("t", "quiet", [work(20, 7)]))
        await asyncio.sleep(0.01)
        backend.open.set()
        await quiet
        assert [item.k for item in backend.batches[1]].count(7) == 1
        await asyncio.gather(first, *floods)


async def test_equal_runs_of_a_tenant_get_equal_answers_from_the_start() -> None:
    """Four runs of 16 clients share contexts; the first run asks first, so it needs each context computed."""
    backend = Held()
    answers: Counter[int] = Counter()
    async with scheduler_of(backend, max_queued_tokens=100_000, context_cache_bytes=100_000) as scheduler:
        first = await hold(backend, scheduler)
        enough = asyncio.Event()

        async def client(run: int, number: int) -> None:
            while True:
                await scheduler.submit("t", f"{run}", [work(20, run, context(1000 + number % 3))])
                answers[run] += 1
                if answers.total() == 240:
                    enough.set()

        clients = [asyncio.create_task(client(run, number)) for run in range(4) for number in range(16)]
        await asyncio.sleep(0.05)
        backend.open.set()
        await enough.wait()
        counts = [answers[run] for run in range(4)]
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await first
    assert max(counts) - min(counts) <= 16


async def test_a_tenant_pays_for_its_new_contexts() -> None:
    """One tenant brings a new context with each item, the other one short items: they get the same tokens."""
    backend = Held()
    async with scheduler_of(backend, max_queued_tokens=100_000, context_cache_bytes=100_000) as scheduler:
        first = await hold(backend, scheduler)
        costly = [asyncio.create_task(scheduler.submit("u", "r", [work(20, 1, context(300 + n))])) for n in range(20)]
        short = [asyncio.create_task(scheduler.submit("t", "r", [work(20, 2)])) for _ in range(200)]
        await asyncio.sleep(0.05)
        backend.open.set()
        await asyncio.gather(first, *costly, *short)
    items = [item.k for batch in backend.batches for item in batch]
    last_short = len(items) - items[::-1].index(2)
    assert items[:last_short].count(1) == pytest.approx(200 * 20 / 320, abs=3)


async def test_a_full_queue_refuses_and_names_a_time() -> None:
    backend = Held()
    async with scheduler_of(backend, max_queued_tokens=100) as scheduler:
        first = await hold(backend, scheduler)
        whole = asyncio.create_task(
            scheduler.submit("t", "large", [work(500)])
        )  # larger than the queue, which is empty
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull) as caught:
            await scheduler.submit("other", "r", [work(1)])
        assert 0.1 <= caught.value.retry_after_s <= 60
        backend.open.set()
        await asyncio.gather(first, whole)


async def test_a_run_leaves_room_for_others() -> None:
    """A run with waiting items may fill a quarter of the queue, a tenant half."""
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        first = await hold(backend, scheduler)
        waiting = [asyncio.create_task(scheduler.submit("t", "a", [work(200)]))]
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await scheduler.submit("t", "a", [work(100)])
        waiting.append(asyncio.create_task(scheduler.submit("t", "b", [work(200)])))
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFull):
            await scheduler.submit("t", "c", [work(200)])
        waiting.append(asyncio.create_task(scheduler.submit("u", "c", [work(200)])))
        await asyncio.sleep(0.01)
        backend.open.set()
        await asyncio.gather(first, *waiting)


async def test_one_bad_item_is_alone_with_its_failure() -> None:
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        results = await scheduler.submit("t", "r", [work(10, 1), work(10, 13), work(10, 2)])
    assert numbers(results) == [1, "internal", 2]


class Mortal(Held):
    """A backend whose process dies of every item with `k` 13."""

    def __init__(self) -> None:
        super().__init__()
        self.restarts = 0

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        if any(work.k == 13 for work in batch):
            raise BackendLost("the engine died")
        return super().score(batch)

    def restart(self) -> None:
        self.restarts += 1


async def test_an_item_that_ends_the_models_process_is_refused_for_good() -> None:
    """The process starts again, the other items are answered, and the item never reaches the process again."""
    backend = Mortal()
    async with scheduler_of(backend, window_s=0.01) as scheduler:
        assert numbers(await scheduler.submit("t", "r", [work(10, 1), work(10, 13), work(10, 2)])) == [1, "internal", 2]
        assert backend.restarts == 2  # the batch, then the item alone
        assert numbers(await scheduler.submit("u", "r", [work(10, 13)])) == ["internal"]
        assert numbers(await scheduler.submit("u", "r", [work(10, 13), work(10, 3)])) == ["internal", 3]
        assert scheduler.failure is None
    assert backend.restarts == 2


async def test_a_tenant_whose_items_end_the_process_again_and_again_is_refused() -> None:
    """Its next item would end the server for all tenants."""
    backend = Mortal()
    async with scheduler_of(backend) as scheduler:
        for length in range(10, 20):
            assert numbers(await scheduler.submit("t", "r", [work(length, 13)])) == ["internal"]
        assert numbers(await scheduler.submit("t", "r", [work(10, 1)])) == ["internal"]
        assert numbers(await scheduler.submit("u", "r", [work(10, 1)])) == [1]
        assert scheduler.failure is None
    assert backend.restarts == 3


async def test_states_of_a_dead_process_are_not_used() -> None:
    backend = Mortal()
    async with scheduler_of(backend) as scheduler:
        await scheduler.submit("t", "r", [work(10, 1, context(50))])
        await scheduler.submit("t", "r", [work(10, 13)])
        await scheduler.submit("t", "r", [work(10, 2, context(50))])
    assert backend.prefills == [50, 50]


async def test_a_process_that_keeps_dying_stops_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise items would fail one by one behind a health check that passes."""
    monkeypatch.setattr("teacher_server.scoring.scheduler.MAX_RESTARTS", 1)
    async with scheduler_of(Mortal()) as scheduler:
        with pytest.raises(SchedulerStopped, match="the batch loop failed: BackendLost the engine died"):
            await asyncio.wait_for(scheduler.submit("t", "r", [work(10, 13), work(10)]), 5)
        assert scheduler.failure is not None


async def test_cancelled_items_are_not_computed() -> None:
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        first = await hold(backend, scheduler)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(scheduler.submit("t", "r", [work(10, 5) for _ in range(4)]), 0.01)
        assert scheduler.queue.tokens == 0
        backend.open.set()
        await first
        await scheduler.submit("t", "r", [work(10, 6)])
    assert not any(item.k == 5 for batch in backend.batches for item in batch)


async def test_contexts_that_do_not_fit_together_take_several_passes() -> None:
    backend = Held()
    async with scheduler_of(backend, batch_tokens=10_000) as scheduler:
        first = await hold(backend, scheduler)
        asked = asyncio.create_task(scheduler.submit("t", "r", [work(10, n, context(60 + n % 3)) for n in range(6)]))
        await asyncio.sleep(0.01)
        backend.open.set()
        assert numbers(await asked) == list(range(6))
        await first
        assert scheduler.cache.nbytes <= 1000


async def test_contexts_to_be_computed_count_for_the_budget() -> None:
    """A batch takes one long context at a time: the items behind it would wait for all of them."""
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        first = await hold(backend, scheduler)
        asked = asyncio.create_task(scheduler.submit("t", "r", [work(10, n, context(80 + n)) for n in range(3)]))
        await asyncio.sleep(0.01)
        backend.open.set()
        await asyncio.gather(first, asked)
    assert [len(batch) for batch in backend.batches] == [1, 1, 1, 1]


async def test_a_long_context_does_not_join_a_batch_that_others_wait_for() -> None:
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        first = await hold(backend, scheduler)
        quiet = asyncio.create_task(scheduler.submit("u", "r", [work(20, 1)]))
        costly = asyncio.create_task(scheduler.submit("t", "r", [work(20, 2, context(90))]))
        await asyncio.sleep(0.01)
        backend.open.set()
        await asyncio.gather(first, quiet, costly)
    assert [[work.k for work in batch] for batch in backend.batches] == [[0], [1], [2]]


async def test_stop_finishes_what_is_queued() -> None:
    backend = Held()
    async with scheduler_of(backend) as scheduler:
        first = await hold(backend, scheduler)
        asked = asyncio.create_task(scheduler.submit("t", "r", [work(60, n) for n in range(5)]))
        await asyncio.sleep(0.01)
        stopped = asyncio.create_task(scheduler.stop())
        await asyncio.sleep(0.01)
        assert not stopped.done()
        backend.open.set()
        await stopped
        assert first.done()
        assert numbers(asked.result()) == list(range(5))


async def test_a_backend_that_loses_a_result_gives_nobody_anothers_score() -> None:
    class Loses(Held):
        def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
            return [result for result in super().score(batch) if numbers([(result, 0)]) != [5]]

    async with scheduler_of(Loses(), window_s=0.01) as scheduler:
        results = await scheduler.submit("t", "r", [work(10, n) for n in (4, 5, 6)])
    assert numbers(results) == [4, "internal", 6]


async def test_every_waiter_gets_the_fault_of_the_batch_loop() -> None:
    """The computed, the queued and the next items all fail: none waits for a loop that has ended."""
    backend = Held()

    def faulty(report: BatchReport) -> None:
        raise KeyError("a series that is not there")

    async with scheduler_of(backend, on_batch=faulty) as scheduler:
        first = await hold(backend, scheduler)
        queued = asyncio.create_task(scheduler.submit("t", "r", [work(60), work(60)]))
        await asyncio.sleep(0.01)
        assert scheduler.failure is None
        backend.open.set()
        for waiting in (first, queued):
            with pytest.raises(SchedulerStopped, match="a series that is not there"):
                await asyncio.wait_for(waiting, 5)
        with pytest.raises(SchedulerStopped):
            await scheduler.submit("t", "r", [work(1)])
        assert scheduler.queue.tokens == 0


@pytest.mark.parametrize(("path", "charged"), [("shared_prefix", 20), ("engine", 20), ("full", 60)])
async def test_a_context_is_charged_as_often_as_it_is_computed(path: str, charged: int) -> None:
    """Otherwise many short items under a long context would cost their tenant next to nothing."""
    backend, reports = Held(), list[BatchReport]()
    backend.path = path
    async with scheduler_of(backend, on_batch=reports.append) as scheduler:
        charges: list[tuple[str, int]] = []
        scheduler.queue.charge = lambda tenant, tokens: charges.append((tenant, tokens))  # type: ignore[method-assign]
        await scheduler.submit("t", "r", [work(5, n, context(20)) for n in range(3)])
    assert sum(sum(report.context_tokens.values()) for report in reports) == charged
    assert sum(tokens for _, tokens in charges) == charged
