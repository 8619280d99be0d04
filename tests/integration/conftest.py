"""A pool of two stand-ins for rollout workers, on a Ray of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import ray

from rollout_workers.actor import GROUPS
from rollout_workers.pool.pool import WorkerPool
from tests.support.pool_workers import Echo


@pytest.fixture(scope="module")
def pool_cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, resources={"room": 1}, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
async def pool(pool_cluster: None) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(max_in_flight=4, max_restarts=2)
    actor = ray.remote(concurrency_groups=GROUPS)(Echo)
    first = await pool.start(lambda number, slot: actor.options(num_cpus=0, max_concurrency=8).remote(number), 2)
    assert first == "worker 0"
    yield pool
    handles = pool.handles()
    pool.close()
    for handle in handles:
        ray.kill(handle)
