"""The teacher: what a cached context saves, what the wire costs, how a quiet run fares beside loud ones.

SmolLM2-135M, 16 samples of 16 prompt and 64 response tokens, k = 256 unless said; all figures of one run are taken in
one process, alternating where two are compared.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from common.config.model import TeacherConfig
from common.protocol.codec import encode_request, encode_response
from common.protocol.schema import Context, Ids, ItemScore, ScoreItem, ScoreRequest, ScoreResponse, as_ids, context_hash
from teacher_server.backends.base import Work
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.client import TeacherClient
from teacher_server.http.auth import Authenticator
from teacher_server.http.serve import start_in_thread
from teacher_server.scoring.service import TeacherService, TokenizerIdentity
from tests.benchmarks.e2e_runs import MODEL
from tests.benchmarks.figures import THREADS, Figure, Figures
from tests.support.memory import peak_bytes, reset_peak

K, PROMPT, RESPONSE = 256, 16, 64
CACHE_LIMIT = "10.6 by FLOPs"
"""Multiplications a sample of SmolLM2-135M. With 1,024 tokens of context in the pass: 1,104 tokens x 106M weights of
the layers, 21G of attention, 64 x 28M of the output layer, 140G in all. With the context cached: 80 x 106M, 2.9G of
attention, the same output layer, 13.2G in all.
"""
PAUSE_S = 1.0
IDENTITY = TokenizerIdentity("ab" * 32, "cd" * 32)


def run() -> Figures:
    """All figures."""
    torch.set_num_threads(THREADS)
    backend = TransformersBackend.load(str(MODEL))
    figures: Figures = {}
    for part in (cache_speedup, linearity, flood):
        figures.update(part(backend))
    for alone in (bytes_per_token, memory, wire):
        figures.update(alone())
    return figures


def make_items(
    count: int, *, seed: int = 0, lead: Ids | None = None, prompt: int = PROMPT, response: int = RESPONSE
) -> list[ScoreItem]:
    """Items of random ids; `lead` is put ahead of every prompt."""
    rng = np.random.default_rng(seed)
    return [
        ScoreItem(
            context=None,
            prompt_ids=as_ids(np.concatenate([as_ids([]) if lead is None else lead, rng.integers(0, 49_152, prompt)])),
            response_ids=as_ids(rng.integers(0, 49_152, response)),
            topk_ids=as_ids(np.stack([rng.choice(49_152, K, replace=False) for _ in range(response)])),
        )
        for _ in range(count)
    ]


def works(items: list[ScoreItem], prefix: Any = None) -> list[Work]:
    """The items as a backend takes them."""
    return [Work(item, prefix, "at_ids", 1.0, K) for item in items]


def seconds(action: Callable[[], object]) -> float:
    """Duration of one call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def cache_speedup(backend: TransformersBackend) -> Figures:
    """Context of 1,024 tokens, cached, against the same backend with the context ahead of every prompt."""
    context = as_ids(np.random.default_rng(1).integers(0, 49_152, 1024))
    prefix = backend.prefill([context], None)[0]
    cached, whole = works(make_items(16), prefix), works(make_items(16, lead=context))
    backend.score(cached)
    with_cache, without = [], []
    for _ in range(3):
        with_cache.append(seconds(lambda: backend.score(cached)))
        # Item by item as it fits best: a packed row of 17,664 tokens would only make it slower.
        without.append(seconds(lambda: [backend.score([work]) for work in whole]))
    ratio = statistics.median(without) / statistics.median(with_cache)
    how = (
        f"16 samples under 1,024 tokens of context: {statistics.median(without):.2f} s with the context in every "
        f"forward pass, {statistics.median(with_cache):.2f} s with its cache warm; medians of 3, alternating"
    )
    return {"teacher.context_cache_speedup": Figure(ratio, "x", how, at_least=8.5, limit=CACHE_LIMIT)}


def linearity(backend: TransformersBackend) -> Figures:
    """Seconds a sample at 64 samples over seconds a sample at 8."""
    prefix = backend.prefill([as_ids(np.random.default_rng(1).integers(0, 49_152, 1024))], None)[0]
    few, many = works(make_items(8), prefix), works(make_items(64), prefix)
    backend.score(few)
    each_few, each_many = [], []
    for _ in range(5):
        # 64 samples either way, so that whatever else the machine does hits both alike.
        each_few.append(seconds(lambda: [backend.score(few) for _ in range(8)]) / 64)
        each_many.append(seconds(lambda: backend.score(many)) / 64)
    ratio = statistics.median(m / f for m, f in zip(each_many, each_few, strict=True))
    how = (
        f"{1000 * statistics.median(each_few):.0f} ms a sample at 8 samples, "
        f"{1000 * statistics.median(each_many):.0f} ms at 64, context of 1,024 tokens; median ratio of 5 rounds, "
        "alternating"
    )
    return {"teacher.context_linearity": Figure(ratio, "x", how, at_most=1.1, limit="1 by FLOPs")}


def memory() -> Figures:
    """Peak of a fresh process while 32 samples are scored under a context, over what the context's state takes.

    A process of its own: what others have allocated and freed before would hide, or hold, what this takes.
    """
    code = f"import {__name__}; {__name__}.print_memory()"
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    held, extra = map(int, printed.split()[-2:])
    ratio = extra / held
    how = (
        f"peak resident memory of a fresh process while 32 samples are scored under 4,096 tokens of context, context "
        f"included, less what was resident before: {extra / 1e6:.0f} MB over {held / 1e6:.0f} MB of one context state"
    )
    return {"teacher.context_memory_ratio": Figure(ratio, "x", how, at_most=1.5, limit="1: one state")}


def print_memory() -> None:
    """Bytes of a context's state, and how far resident memory rises above what was there before it."""
    torch.set_num_threads(THREADS)
    backend = TransformersBackend.load(str(MODEL))
    context = as_ids(np.random.default_rng(1).integers(0, 49_152, 4096))
    backend.score(
        works(make_items(2), backend.prefill([context[:64]], None)[0])
    )  # the libraries' own first allocations
    prefix = backend.prefill([context], None)[0]
    held = prefix.nbytes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak() - held
    backend.score(works(make_items(32), prefix))
    print(held, peak_bytes() - before)


def bytes_per_token() -> Figures:
    """Encoded bodies of one exchange over its response tokens."""
    batch = make_items(16)
    request = len(encode_request(ScoreRequest("0" * 32, "run", "at_ids", 1.0, K, tuple(batch)))) / (16 * RESPONSE)
    results = tuple(ZeroCost(RESPONSE).score(works(batch)))
    reply = len(encode_response(ScoreResponse("0" * 32, "0" * 64, 0, results))) / (16 * RESPONSE)
    return {
        "teacher.request_bytes_per_token": Figure(
            request, "B", f"encoded request, k = {K}", at_most=800, limit=f"{2 * K + 2}: k + 1 ids of two bytes"
        ),
        "teacher.reply_bytes_per_token": Figure(
            reply, "B", f"encoded reply, k = {K}", at_most=530, limit=f"{2 * K + 8}: k float16, two float32"
        ),
    }


# --- over HTTP ------------------------------------------------------------------------------------------------------


class ZeroCost:
    """A backend of the same shapes that computes nothing: what remains is encode, copy, HTTP and decode."""

    name = "zero-cost"
    dtype = "float32"
    model_name = "none"
    model_fingerprint = "0" * 64
    vocab_size = 49_152
    max_sequence_tokens = 1 << 20
    weight_version = 0

    def __init__(self, response: int) -> None:
        self.modes = {"at_ids": None}
        rng = np.random.default_rng(0)
        self._score = ItemScore(
            rng.normal(size=(response, K)).astype(np.float16),
            rng.normal(size=response).astype(np.float32),
            rng.normal(size=response).astype(np.float32),
        )

    def prefix_bytes(self, tokens: int) -> int:
        """Nothing is kept."""
        return tokens

    def embeds(self, ids: Ids) -> bool:
        """All ids are fine."""
        return True

    def prefill(self, ids: Ids, parent: Any) -> Any:
        """Nothing is computed."""
        raise NotImplementedError

    def score(self, batch: list[Work]) -> list[ItemScore]:
        """The same numbers every time."""
        return [self._score for _ in batch]


@contextmanager
def served(backend: Any, **settings: Any) -> Iterator[str]:
    """A server around `backend` in a thread of this process: its address."""
    config = TeacherConfig(model="bench", **settings)
    service = TeacherService(backend, config, IDENTITY, thread_setup=lambda: torch.set_num_threads(THREADS))
    server = start_in_thread(service, config, Authenticator())
    try:
        yield server.url
    finally:
        server.stop()


def serve_zero_cost() -> None:
    """In a process of its own: serve until the parent closes its end."""
    with served(ZeroCost(1024), max_sequence_tokens=2048, batch_tokens=1 << 20, batch_window_ms=0) as url:
        print(url, flush=True)
        sys.stdin.read()


@contextmanager
def zero_cost_process() -> Iterator[str]:
    """A server of its own process around `ZeroCost`: its address."""
    code = f"import {__name__}; {__name__}.serve_zero_cost()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate("")


def wire() -> Figures:
    """One call of 65,536 tokens through client and server, bytes both ways over the time it takes."""
    batch = make_items(64, response=1024)
    sent = len(encode_request(ScoreRequest("0" * 32, "run", "at_ids", 1.0, K, tuple(batch))))

    async def exchange(url: str) -> tuple[float, int]:
        client = TeacherClient(url, "run", 60)
        times = []
        for _ in range(15):
            began = time.perf_counter()
            response = await client.score(batch, "at_ids", 1.0, K)
            times.append(time.perf_counter() - began)
        await client.close()
        return statistics.median(times), len(encode_response(response))

    with zero_cost_process() as url:
        took, received = asyncio.run(exchange(url))
    rate = (sent + received) / took / 1e6
    how = (
        f"65,536 tokens in one call of the client: {sent / 1e6:.0f} MB there, {received / 1e6:.0f} MB back, "
        f"{1000 * took:.0f} ms; client and server in two processes, a backend that computes nothing; median of 15"
    )
    return {"teacher.wire_share": Figure(rate, "MB/s", how, at_least=300)}


def flood(backend: TransformersBackend) -> Figures:
    """p99 of a quiet run's single requests beside three runs that always have four requests of 16 samples waiting.

    Quiet is who leaves the teacher alone between two requests: else it is a fourth that takes all it can.
    """
    pauses = random.Random(0)
    context_ids = as_ids(np.random.default_rng(1).integers(0, 49_152, 256))
    context = Context(context_hash(IDENTITY.tokenizer, context_ids), context_ids)
    single = [ScoreItem(context.hash, i.prompt_ids, i.response_ids, i.topk_ids) for i in make_items(1)]

    async def quiet(url: str, count: int, pause_s: float = PAUSE_S) -> list[float]:
        client = TeacherClient(url, "quiet", 120)
        await client.put_context(context)
        times = []
        for _ in range(count):
            await asyncio.sleep(pauses.uniform(0, 2 * pause_s))
            began = time.perf_counter()
            await client.score(single, "at_ids", 1.0, K)
            times.append(time.perf_counter() - began)
        await client.close()
        return times

    async def loud(url: str, name: str) -> None:
        client = TeacherClient(url, name, 120)
        await client.put_context(context)
        batch = [ScoreItem(context.hash, i.prompt_ids, i.response_ids, i.topk_ids) for i in make_items(16)]

        async def again() -> None:
            while True:
                await client.score(batch, "at_ids", 1.0, K)

        try:
            await asyncio.gather(*(again() for _ in range(4)))
        finally:
            await client.close()

    async def both(url: str) -> tuple[list[float], list[float]]:
        floods = [asyncio.create_task(loud(url, f"loud-{n}")) for n in range(3)]
        await asyncio.sleep(2)
        times = await quiet(url, 30), await quiet(url, 5, 0.0)
        assert not any(task.done() for task in floods)
        for task in floods:
            task.cancel()
        await asyncio.wait(floods)
        return times

    alone, beside, hasty = [], [], []
    with served(backend) as url:
        asyncio.run(quiet(url, 5))
        for _ in range(3):
            alone += asyncio.run(quiet(url, 30))
            slow, fast = asyncio.run(both(url))
            beside += slow
            hasty += fast
    p99_alone, p99_beside = (float(np.quantile(times, 0.99)) for times in (alone, beside))
    ratio = p99_beside / p99_alone
    how = (
        f"single requests of a quiet run, {PAUSE_S:g} s between them on average: p99 {1000 * p99_alone:.0f} ms alone, "
        f"{1000 * p99_beside:.0f} ms beside three runs with four requests of 16 samples waiting each; medians "
        f"{1000 * statistics.median(alone):.0f} and {1000 * statistics.median(beside):.0f} ms, and "
        f"{1000 * statistics.median(hasty):.0f} ms where each follows the one before at once, which asks for the whole "
        "teacher and gets a quarter; 90, 90 and 15 requests in three rounds, alternating, default settings"
    )
    return {"teacher.flood_p99_ratio": Figure(ratio, "x", how, at_most=4)}
