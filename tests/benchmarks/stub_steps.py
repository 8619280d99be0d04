"""Steps of the loop over the services of `stub_services`, and what each cost."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from common.config.model import Config
from common.garbage import skip_present_objects
from learner.cluster.services import Services
from learner.loop.training_loop import TrainingLoop
from learner.loop.weight_publisher import WeightPublisher
from tests.benchmarks.stub_services import Latencies, install, prompts
from tests.support.memory import resident_bytes

SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class StepCost:
    """Wall seconds of one step, CPU seconds of the loop's thread, bytes of this process after it."""

    wall_s: float
    cpu_s: float
    resident_bytes: int


def run_steps(config: Config, latencies: Latencies, count: int) -> list[StepCost]:
    """Run `count` steps in a Ray of two cores."""
    with _stub_cluster(latencies):
        return asyncio.run(_run_steps(config, count))


def store_use(config: Config, latencies: Latencies, count: int, room_bytes: int) -> StoreUse:
    """Run `count` steps over an object store of `room_bytes`. Watching it slows the steps down."""
    with _stub_cluster(latencies, object_store_memory=room_bytes), _store_watched() as use:
        asyncio.run(_run_steps(config, count))
    return use


@contextmanager
def _stub_cluster(latencies: Latencies, **settings: Any) -> Iterator[None]:
    install(latencies)
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False, **settings)
    try:
        with skip_present_objects():  # as in `learner.train`
            yield
    finally:
        ray.shutdown()


@dataclass(slots=True)
class StoreUse:
    """Bytes in Ray's object store: the most at once, written to disk, and made in all."""

    peak_bytes: int = 0
    spilled_bytes: int = 0
    created_bytes: int = 0


@contextmanager
def _store_watched() -> Iterator[StoreUse]:
    """Look at the object store every `SAMPLE_S`."""
    from ray._private.internal_api import node_stats

    node, use, ended = ray.nodes()[0], StoreUse(), threading.Event()

    def look() -> None:
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
        use.peak_bytes = max(use.peak_bytes, stats.object_store_bytes_used)
        use.spilled_bytes, use.created_bytes = stats.spilled_bytes_total, stats.cumulative_created_bytes

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            look()

    thread = threading.Thread(target=watch, name="object store")
    thread.start()
    try:
        yield use
        look()
    finally:
        ended.set()
        thread.join()


async def _run_steps(config: Config, count: int) -> list[StepCost]:
    services = Services(config)
    try:
        services.teachers.begin(services.placement)
        ranks = services.begin_ranks()
        scorer = await services.teachers.connect({}, tokenizer_fingerprint="1" * 64, added_tokens={}, longest_tokens=64)
        await services.start_workers("none", scorer, config.rollout.workers)
        await services.wait_ranks(ranks)
        rows = prompts(64)
        publisher = WeightPublisher(config, services, lambda _: None)
        await publisher.begin(rows)
        loop = TrainingLoop(config, services, publisher, rows, lambda _: None)
        await loop.begin(0)
        costs = []
        for step in range(count):
            wall, cpu = time.perf_counter(), time.thread_time()
            await loop.step(step)
            wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
            gc.collect()
            costs.append(StepCost(wall, cpu, resident_bytes()))
        await loop.close()
        return costs
    finally:
        services.close()
