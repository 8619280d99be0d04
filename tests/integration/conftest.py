"""A pool of two stand-ins for rollout workers, on a separate Ray cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import ray

from rollout_workers.pool.pool import START_TIMEOUT_S, WorkerPool
from tests.support.pool_workers import Maker


@pytest.fixture(scope="module")
def pool_cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, resources={"room": 1}, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
async def pool(pool_cluster: None, maker: Maker, request: pytest.FixtureRequest) -> AsyncIterator[WorkerPool]:
    """A pool of two workers that `maker` makes; a parameter is its `start_timeout_s`."""
    pool = WorkerPool(max_in_flight=4, max_restarts=2, start_timeout_s=getattr(request, "param", START_TIMEOUT_S))
    first = await pool.start(maker, 2)
    assert first == "worker 0"
    yield pool
    handles = pool.handles()
    pool.close()
    for handle in handles:
        ray.kill(handle)
