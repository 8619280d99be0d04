"""The loop without models: how much of the stages overlaps, and what the loop costs per trajectory."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import ray

from learner.cluster.services import Services
from learner.loop.training_loop import TrainingLoop
from learner.loop.weight_publisher import WeightPublisher
from tests.benchmarks.figures import Figure, Figures
from tests.benchmarks.stub_services import Latencies, install, prompts, stub_config

ANSWERS, STEPS = 32, 7
QUEUED = 10_000


def run() -> Figures:
    """Both figures; about a minute."""
    return {**overlap(), **controller_cost()}


def overlap() -> Figures:
    """Step time over the slowest stage: 1.0 s of rollouts, 0.8 s of scoring, 0.9 s of training."""
    latencies = Latencies(ANSWERS, rollout=1.0, score=0.8, train=0.9)
    config = stub_config(
        rollout={"batch_size": ANSWERS}, learner={"micro_batch_tokens": 24}, teacher={"batch_items": 1}
    )
    seconds = steps(config, latencies, STEPS)
    value = statistics.median(seconds[1:])
    return {
        "loop.overlap_ratio": Figure(
            value,
            "x",
            f"median of {STEPS - 1} steps of {ANSWERS} answers; slowest stage 1.0 s; serial would be 2.7",
            at_most=1.25,
            limit="1: the slowest stage",
        )
    }


def controller_cost() -> Figures:
    """Wall time per trajectory when all are ready at once: whatever is not a model costs at least this."""
    config = stub_config(
        rollout={"batch_size": QUEUED, "concurrency": 512}, learner={"micro_batch_tokens": 8192}, loss={"top_k": 1}
    )
    whole, busy = timed_steps(config, Latencies(QUEUED), 2)[1]
    value = busy / QUEUED * 1e6
    return {
        "loop.controller_us_per_trajectory": Figure(
            value,
            "us",
            f"CPU time of the loop's thread in a step of {QUEUED} queued answers; the step itself took "
            f"{whole / QUEUED * 1e6:.0f} us an answer (actors, HTTP and object store on the same two cores)",
            at_most=2000,
        )
    }


def steps(config: Any, latencies: Latencies, count: int) -> list[float]:
    """Wall seconds of `count` steps."""
    return [wall for wall, _ in timed_steps(config, latencies, count)]


def timed_steps(config: Any, latencies: Latencies, count: int) -> list[tuple[float, float]]:
    """(wall seconds, CPU seconds of this thread) of each step."""
    install(latencies)
    ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        return asyncio.run(_timed_steps(config, count))
    finally:
        ray.shutdown()


async def _timed_steps(config: Any, count: int) -> list[tuple[float, float]]:
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
        seconds = []
        for step in range(count):
            wall, cpu = time.perf_counter(), time.thread_time()
            await loop.step(step)
            seconds.append((time.perf_counter() - wall, time.thread_time() - cpu))
        await loop.close()
        return seconds
    finally:
        services.close()
