"""The pool of rollout workers over real actors (without engines): losses, replacements, answers made again."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import ray

from common.async_utils import value_of
from rollout_workers.pool.pool import PoolError, WorkerPool
from tests.support.pool_workers import Asked, Maker, NeverUp, call


async def test_answers_are_dealt_out_and_wait_for_a_slot(pool: WorkerPool) -> None:
    started = time.monotonic()
    done = await asyncio.gather(*(pool.run(f"row{i}", 10, call(0.2)) for i in range(16)))
    assert sorted(number for number, _ in done) == [0] * 8 + [1] * 8
    assert time.monotonic() - started >= 0.4  # eight at a time


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
    assert {worker.slot for worker in (*pool.members, *pool.ready)} == {0, 1}
    pool.admit(pool.ready[0])
    assert [worker.number for worker in pool.members] == [next(iter({0, 1} & {w.number for w in pool.members})), 2]


async def test_where_nobody_is_left_answers_wait_for_the_replacement(pool: WorkerPool) -> None:
    for worker in pool.members:
        pool.lose(worker, "killed by the test")
    waiting = asyncio.create_task(pool.run("row", 10, call(0.0)))
    await pool.only_replacements()
    assert not waiting.done()
    pool.admit(pool.ready[0])
    assert (await waiting)[0] in (2, 3)


async def test_the_last_to_answer_may_die_after_its_replacement_is_up(pool: WorkerPool, maker: Maker) -> None:
    first, second = pool.members
    pool.lose(first, "killed by the test")
    await pool.next_ready()
    waiting = asyncio.create_task(pool.only_replacements())
    await asyncio.sleep(0.2)
    assert not waiting.done()  # the second still answers
    maker.kind = NeverUp
    pool.lose(second, "killed by the test")
    await waiting  # the next replacement, which would wake it too, never comes


async def test_a_pool_has_no_more_replacements_than_it_may(pool: WorkerPool) -> None:
    pool.lose(pool.members[0], "killed by the test")
    assert pool.ready == []
    await pool.next_ready()
    assert [worker.number for worker in pool.ready] == [2]
    for worker in (*pool.members, *pool.ready):
        pool.lose(worker, "killed by the test")
    with pytest.raises(PoolError, match=r"as rollout\.max_restarts allows"):
        await pool.next_ready()


@pytest.mark.parametrize("pool", [1.0], indirect=True)
async def test_a_replacement_that_does_not_come_up_in_time_is_lost_too(pool: WorkerPool, maker: Maker) -> None:
    maker.kind = NeverUp
    for worker in pool.members:
        pool.lose(worker, "killed by the test")
    with pytest.raises(PoolError, match=r"worker [23] is lost \(its engine was not up within 1 s: no node has room"):
        await pool.run("row", 10, call(0.0))


async def test_a_worker_whose_engine_hangs_fails_the_health_check(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rollout_workers.pool.pool.HEALTH_TIMEOUT_S", 1.0)
    hangs = pool.members[1]
    await value_of(hangs.handle.hang.remote())
    await pool.check_health()
    assert [worker.number for worker in pool.members] == [0]
    assert "worker 1 is lost: its engine hangs: no answer to a health check within 1 s" in caplog.text


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
    running = [asyncio.create_task(pool.run(f"row{i}", 10, call(3600.0))) for i in range(8)]
    await asyncio.sleep(0.2)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    done = await asyncio.gather(*(pool.run(f"row{i}", 10, call(0.0)) for i in range(8)))
    assert len(done) == 8


async def test_a_member_whose_actor_is_gone_fails_the_health_check(pool: WorkerPool) -> None:
    ray.kill(pool.members[0].handle)
    async with asyncio.timeout(30):  # the kill may arrive behind the first question
        while len(pool.members) == 2:
            await pool.check_health()
    assert [worker.number for worker in pool.members] == [1]
    assert pool.restarts == 1


# --- rollouts: one actor call each ------------------------------------------------------------------------------------


async def counts_of(pool: WorkerPool) -> dict[str, int]:
    """Rollouts that the workers began, cancelled and run now, summed over the workers."""
    counts = await asyncio.gather(*(value_of(worker.handle.counts.remote()) for worker in pool.members))
    return {name: sum(one[name] for one in counts) for name in counts[0]}


async def until_running(pool: WorkerPool, wanted: int) -> None:
    """Wait until that many rollouts run at the workers, and stay so: a cancelled one may begin before it ends."""
    for _ in range(200):
        running = []
        for _ in range(4):
            running.append((await counts_of(pool))["running"])
            await asyncio.sleep(0.05)
        if running == [wanted] * 4:
            return
    raise AssertionError(f"{running} rollouts run at the workers, not {wanted}")


def rollout(pool: WorkerPool, row: str, **asked: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(pool.run(row, 10, lambda handle: handle.rollout.remote(Asked(**asked))))


async def test_a_rollout_does_not_wait_for_others_and_its_item_is_its_own(pool: WorkerPool) -> None:
    slow = [rollout(pool, "same", seconds=3600.0) for _ in range(2)]
    number, item = await rollout(pool, "same")
    assert await value_of(item) == b"item of %d" % number * 50_000
    assert not any(one.done() for one in slow)
    for one in slow:
        one.cancel()


async def test_rollouts_wait_for_a_free_worker(pool: WorkerPool) -> None:
    waiting = [rollout(pool, f"row{i}", seconds=3600.0) for i in range(8)]
    more = rollout(pool, "more")
    await asyncio.sleep(0.5)
    assert (await counts_of(pool))["begun"] == 8
    assert not more.done()
    waiting[0].cancel()
    await more
    for one in waiting:
        one.cancel()


async def test_what_a_dead_worker_was_making_is_made_once_more_and_what_it_made_is_kept(
    pool: WorkerPool, tmp_path: Any
) -> None:
    kept = await asyncio.gather(*(rollout(pool, f"kept{i}") for i in range(4)))
    trap = tmp_path / "trap"
    trap.touch()
    rollouts = [rollout(pool, f"row{i}", seconds=0.2, trap=str(trap)) for i in range(20)]
    done = await asyncio.gather(*rollouts)
    assert len(done) == 20
    assert pool.restarts == 1
    assert 1 <= pool.reissued <= 4  # no more than it had in flight
    for number, item in kept:
        assert await value_of(item) == b"item of %d" % number * 50_000


async def test_rollouts_of_a_worker_that_is_given_up_go_to_another(pool: WorkerPool) -> None:
    rollouts = [rollout(pool, f"row{i}", seconds=0.5) for i in range(8)]
    await asyncio.sleep(0.1)
    lost = pool.members[0]
    pool.lose(lost, "killed by the test")
    done = await asyncio.gather(*rollouts)
    assert {number for number, _ in done} == {pool.members[0].number}
    assert pool.reissued == 4


async def test_a_cancelled_rollout_is_stopped_at_the_worker_and_gives_its_slot_back(pool: WorkerPool) -> None:
    running = [rollout(pool, f"row{i}", seconds=3600.0) for i in range(8)]
    await asyncio.sleep(0.5)
    at_once = rollout(pool, "waits for a slot", seconds=3600.0)
    await asyncio.sleep(0)
    for task in (*running, at_once):
        task.cancel()
    await asyncio.gather(*running, at_once, return_exceptions=True)
    done = await asyncio.gather(*(rollout(pool, f"row{i}") for i in range(8)))
    assert len(done) == 8
    seen = await counts_of(pool)
    assert (seen["begun"], seen["cancelled"]) == (16, 8)


async def test_who_is_cancelled_just_as_his_turn_comes_leaves_the_slot(pool: WorkerPool) -> None:
    """Whenever it is: between the end of one answer and the start of the next lie a few turns of the loop."""
    for turns in range(8):
        running = [rollout(pool, f"row{i}", seconds=3600.0) for i in range(8)]
        await asyncio.sleep(0.1)
        waiting = rollout(pool, "waits")
        await asyncio.sleep(0)
        running[0].cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in (*running, waiting):
            task.cancel()
        await asyncio.gather(*running, waiting, return_exceptions=True)
    await until_running(pool, 0)
    running = [rollout(pool, f"row{i}", seconds=3600.0) for i in range(8)]
    await until_running(pool, 8)  # every slot was given back
    for task in running:
        task.cancel()


async def test_what_a_rollout_raises_comes_to_who_gave_it_and_the_worker_lives(pool: WorkerPool) -> None:
    rollouts = [rollout(pool, f"row{i}", error="no such row" if i == 3 else None) for i in range(8)]
    done = await asyncio.gather(*rollouts, return_exceptions=True)
    assert isinstance(done[3], LookupError)
    assert "no such row" in str(done[3])
    assert sum(isinstance(one, tuple) for one in done) == 7
    assert pool.restarts == 0


async def test_a_request_that_cannot_be_pickled_is_an_error_and_not_a_wait(pool: WorkerPool) -> None:
    with pytest.raises(TypeError):
        await pool.run("row", 10, lambda handle: handle.rollout.remote(threading.Lock()))
    assert len(await asyncio.gather(*(rollout(pool, f"row{i}") for i in range(8)))) == 8
