"""The cost of top-k log-probs in a rollout worker: CPU time and memory of the process that takes them from vLLM's."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.protocol.schema import Sampling
from rollout_workers.engine.engine import Generation, RolloutEngine
from tests.benchmarks.figures import Figure, Figures
from tests.support.engines import PROMPT, run_config
from tests.support.memory import peak_bytes, reset_peak
from tests.support.tiny import make_tiny_model

ANSWERS, TOKENS, K = 64, 320, 256
ROUNDS = 3
TICK_S = 0.002


@dataclass(frozen=True)
class Round:
    """`ANSWERS` answers at once: CPU seconds and peak of extra memory of this process, longest pause of its loop."""

    tokens: int
    cpu_s: float
    extra_bytes: int
    pause_s: float


def run() -> Figures:
    """All figures; about a minute on two cores."""
    with tempfile.TemporaryDirectory(prefix="bench-rollout-") as folder:
        return asyncio.run(figures(make_tiny_model(Path(folder))))


async def figures(model: Path) -> Figures:
    """Rounds at `K` and at 0 log-probs in turns, after one of each to warm up."""
    config = run_config(model)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_num_seqs": ANSWERS})})
    engine = await RolloutEngine.start(str(model), config, max_logprobs=K)
    try:
        pairs = [(await answers(engine, 0), await answers(engine, K)) for _ in range(ROUNDS + 1)][1:]
    finally:
        engine.close()

    def difference(per_token: Callable[[Round], float]) -> float:
        return statistics.median(per_token(with_k) - per_token(without) for without, with_k in pairs)

    how = (
        f"{ANSWERS} answers of {TOKENS} tokens at once, k = {K} over k = 0, tiny model: median of {ROUNDS} rounds in "
        "turns, of the process that takes the answers"
    )
    return {
        "rollout.logprob_us_per_token": Figure(
            difference(lambda one: 1e6 * one.cpu_s / one.tokens), "us", f"{how}; CPU time", at_most=10
        ),
        "rollout.logprob_bytes_per_token": Figure(
            difference(lambda one: one.extra_bytes / one.tokens),
            "bytes",
            f"{how}; peak of resident memory",
            at_most=3000,
            limit=f"{4 * K}: k ids of four bytes",
        ),
        "rollout.loop_pause_ms": Figure(
            statistics.median(1e3 * with_k.pause_s for _, with_k in pairs), "ms", f"{how.split(',')[0]}; longest pause"
        ),
    }


async def answers(engine: RolloutEngine, k: int) -> Round:
    """One round; the answers are kept until its end, as by a caller that has not sent them yet."""
    pauses: list[float] = []
    watch = asyncio.create_task(watch_pauses(pauses))
    resident, started = reset_peak(), time.process_time()
    made = await asyncio.gather(*(answer(engine, number, k) for number in range(ANSWERS)))
    cpu_s, extra = time.process_time() - started, peak_bytes() - resident
    watch.cancel()
    assert all(one.topk_ids.shape == (len(one.response_ids), k) for one in made)
    return Round(sum(len(one.response_ids) for one in made), cpu_s, extra, max(pauses))


async def answer(engine: RolloutEngine, number: int, k: int) -> Generation:
    """Answer `number`, the same tokens for every `k`."""
    return await engine.generate(PROMPT, Sampling(TOKENS, top_logprobs=k, seed=number), f"{number}")


async def watch_pauses(pauses: list[float]) -> None:
    """Note by how much each sleep of `TICK_S` was late: nothing else ran on the loop that long."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(TICK_S)
        pauses.append(time.perf_counter() - began - TICK_S)
