"""The pool of rollout workers over real actors (without engines): losses, replacements, answers made again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rollout_workers.pool import PoolError, WorkerPool

pytestmark = pytest.mark.timeout(120)


def die_once(trap: Path) -> None:
    """End the process if the file is still there."""
    if trap.exists():
        trap.unlink()
        os._exit(1)


class Echo:
    """Stands in for a worker: answers with its number, dies when it is told to."""

    def __init__(self, number: int) -> None:
        self.number = number

    async def ready(self) -> str:
        return f"worker {self.number}"

    async def check_health(self) -> None:
        return None

    async def work(self, seconds: float, dies: str | None = None) -> tuple[int, str]:
        """Returns its number; `dies` is the path of a file: the first that finds it takes it away and dies."""
        await asyncio.sleep(seconds)
        if dies is not None:
            die_once(Path(dies))
        return self.number, "item"

    async def deadly(self) -> tuple[int, str]:
        os._exit(1)


def call(*arguments: Any) -> Any:
    return lambda handle: tuple(handle.work.options(num_returns=2).remote(*arguments))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
async def pool(cluster: None) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(slots=4, max_restarts=2)
    actor = ray.remote(Echo)
    first = await pool.start(lambda number, seat: actor.options(num_cpus=0, max_concurrency=8).remote(number), 2)
    assert first == "worker 0"
    yield pool
    handles = pool.handles()
    pool.close()
    for handle in handles:
        ray.kill(handle)


async def test_answers_are_dealt_out_and_wait_for_a_slot(pool: WorkerPool) -> None:
    started = time.monotonic()
    done = await asyncio.gather(*(pool.run(f"row{i}", 10, call(0.5)) for i in range(16)))
    assert sorted(number for number, _ in done) == [0] * 8 + [1] * 8
    assert time.monotonic() - started >= 1.0  # eight at a time


async def test_what_a_dead_worker_was_answering_is_answered_by_another(pool: WorkerPool, tmp_path: Any) -> None:
    trap = tmp_path / "trap"
    trap.touch()
    done = await asyncio.gather(*(pool.run(f"row{i}", 10, call(0.2, str(trap))) for i in range(8)))
    assert len(done) == 8
    assert pool.restarts == 1
    assert pool.reissued >= 1
    assert len(pool.members) == 1  # the replacement waits for the current weights
    await pool.next_ready()
    assert [worker.number for worker in pool.ready] == [2]
    assert {worker.seat for worker in (*pool.members, *pool.ready)} == {0, 1}
    pool.admit(pool.ready[0])
    assert [worker.number for worker in pool.members] == [next(iter({0, 1} & {w.number for w in pool.members})), 2]


async def test_where_nobody_is_left_answers_wait_for_the_replacement(pool: WorkerPool) -> None:
    for worker in pool.members:
        pool.lose(worker, "killed by the test")
    waiting = asyncio.create_task(pool.run("row", 10, call(0.0)))
    await asyncio.wait_for(pool.only_replacements(), 30)
    assert not waiting.done()
    pool.admit(pool.ready[0])
    assert (await asyncio.wait_for(waiting, 10))[0] in (2, 3)


async def test_workers_that_die_faster_than_they_may_be_replaced_end_the_run(pool: WorkerPool) -> None:
    members = pool.members
    pool.lose(members[0], "first")
    pool.lose(members[0], "the same again")  # counted once
    pool.lose(members[1], "second")
    assert pool.restarts == 2
    await pool.next_ready()
    pool.lose(pool.ready[0], "third")
    with pytest.raises(PoolError, match=r"third.*rollout.max_restarts"):
        await pool.run("row", 10, call(0.0))


async def test_an_answer_that_kills_every_worker_ends_the_run_and_is_named(pool: WorkerPool) -> None:
    async def admit() -> None:
        while True:
            await pool.only_replacements()
            pool.admit(pool.ready[0])

    admitting = asyncio.create_task(admit())
    with pytest.raises(PoolError):
        await pool.run("row7", 10, lambda handle: tuple(handle.deadly.options(num_returns=2).remote()))
    admitting.cancel()


async def test_a_cancelled_answer_gives_its_slot_back(pool: WorkerPool) -> None:
    running = [asyncio.create_task(pool.run(f"row{i}", 10, call(60.0))) for i in range(8)]
    await asyncio.sleep(0.2)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    done = await asyncio.wait_for(asyncio.gather(*(pool.run(f"row{i}", 10, call(0.0)) for i in range(8))), 10)
    assert len(done) == 8


async def test_a_member_whose_actor_is_gone_fails_the_health_check(pool: WorkerPool) -> None:
    ray.kill(pool.members[0].handle)
    async with asyncio.timeout(30):  # the kill may arrive behind the first question
        while len(pool.members) == 2:
            await pool.check_health()
    assert [worker.number for worker in pool.members] == [1]
    assert pool.restarts == 1
