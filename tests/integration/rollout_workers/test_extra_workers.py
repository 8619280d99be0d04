"""Workers that join a pool under way and leave it, over real actors (without engines)."""

from __future__ import annotations

import asyncio

import pytest
import ray

from common.async_utils import value_of
from rollout_workers.pool.pool import MAX_EXTRA_STARTS, PoolError, WorkerPool
from tests.support.pool_workers import DiesStarting, Maker, NotHere, call

ROOM = {"resources": {"room": 1}}
"""Options of actors that need `room`, of which the cluster has enough for one actor."""


async def test_an_extra_worker_comes_when_there_is_room_and_answers_when_it_is_admitted(
    pool: WorkerPool, maker: Maker
) -> None:
    maker.options = ROOM
    pool.invite([2, 3])  # there is room for one
    await pool.next_ready()
    await asyncio.sleep(0.5)
    (extra,) = pool.ready
    assert extra.extra
    assert list(pool.nodes) == [extra.number]
    assert len(pool.members) == 2  # it has no current weights yet
    assert len(pool.handles()) == 3  # the other is not there to be asked to stop
    pool.admit(extra)
    done = await asyncio.gather(*(pool.run(f"row{i}", 10, call(0.1)) for i in range(12)))
    assert sum(number == extra.number for number, _ in done) == 4
    assert pool.restarts == pool.failures == 0


async def test_an_extra_worker_that_goes_costs_no_restart_and_is_asked_for_again(
    pool: WorkerPool, maker: Maker
) -> None:
    maker.options = ROOM
    pool.invite([2])
    for expected in (2, 3, 4):
        await pool.next_ready()
        (extra,) = pool.ready
        assert (extra.number, extra.slot) == (expected, 2)
        pool.admit(extra)
        running = asyncio.create_task(pool.run("row", 10, call(0.3)))
        await asyncio.sleep(0.1)
        pool.lose(extra, "its node is gone")
        assert (await running)[0] != expected
    assert (pool.failures, pool.restarts) == (3, 0)
    await pool.run("row", 10, call(0.0))  # `max_restarts` is 2


async def test_an_extra_worker_whose_engine_cannot_start_is_not_asked_for_again(
    pool: WorkerPool, maker: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    maker.kind = NotHere
    pool.invite([2])
    with pytest.raises(PoolError, match="none is being started"):
        await pool.next_ready()
    assert "worker 2 is lost" in caplog.text
    assert "the model does not fit" in caplog.text
    assert (pool.failures, len(pool.handles())) == (1, 2)


async def test_an_extra_worker_that_keeps_dying_while_it_starts_is_given_up(pool: WorkerPool, maker: Maker) -> None:
    maker.kind = DiesStarting
    pool.invite([2])
    with pytest.raises(PoolError, match="none is being started"):
        await pool.next_ready()
    assert (pool.failures, pool.restarts, len(pool.handles())) == (MAX_EXTRA_STARTS, 0, 2)


async def test_a_pool_that_closes_withdraws_whom_it_waits_for(pool: WorkerPool, maker: Maker) -> None:
    maker.options = ROOM
    pool.invite([2, 3])
    await pool.next_ready()
    handles = pool.handles()
    pool.close()
    for handle in handles:
        ray.kill(handle)
    holder = maker(9, 9)
    assert await value_of(holder.ready.remote()) == "worker 9"  # no actor waits for the room
    ray.kill(holder)
