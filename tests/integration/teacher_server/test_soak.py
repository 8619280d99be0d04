"""Sixty-four clients of four runs for ten seconds (two minutes with ``--long``): no failure, no growth of memory."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from torch import Tensor

from common.protocol.schema import Context, ItemScore, ScoreItem, ScoreMode, as_ids, context_hash
from teacher_server.client import TeacherClient
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import items, process, tokens

RUNS, CLIENTS = 4, 64
GROWTH_BYTES = 24 * 1024 * 1024
"""Allowance for allocators. A leak of one body or reply per request would be hundreds of megabytes."""


@dataclass(frozen=True)
class Question:
    """An item and its log-probs by a plain forward pass."""

    item: ScoreItem
    logprobs: Tensor


def questions(model: Path, contexts: list[Context]) -> list[Question]:
    """Items of all lengths, with and without context."""
    oracle = Oracle.load(model)
    found = []
    for n in range(60):
        context = [None, *contexts][n % (1 + len(contexts))]
        item = items(n, 1, prompt=1 + n % 9, response=1 + 7 * (n % 8), context=context and context.hash)[0]
        lead = as_ids([]) if context is None else context.ids
        found.append(Question(item, oracle.logprobs(lead, item.prompt_ids, item.response_ids)))
    return found


async def ask(client: TeacherClient, pool: list[Question], seed: int, until: float) -> int:
    """Ask batches of random questions one after the other and check each answer. Returns the number of answers."""
    rng = np.random.default_rng(seed)
    answers = 0
    while time.monotonic() < until:
        batch = [pool[i] for i in rng.choice(len(pool), rng.integers(1, 6), replace=False)]
        mode: ScoreMode = "at_ids" if rng.random() < 0.8 else "sampled"
        asked = [
            q.item if mode == "at_ids" else ScoreItem(q.item.context, q.item.prompt_ids, q.item.response_ids)
            for q in batch
        ]
        response = await client.score(asked, mode, 1.0, 8)
        for question, item, result in zip(batch, asked, response.results, strict=True):
            assert isinstance(result, ItemScore), result
            assert_score(result, question.logprobs, item)
        answers += len(batch)
    return answers


def series(url: str) -> dict[str, float]:
    """The server's metrics by name and labels."""
    lines = httpx.get(url + "/metrics", trust_env=False, timeout=30).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


async def test_many_clients_of_many_runs(tiny_model: Path, pytestconfig: pytest.Config) -> None:
    duration_s = 120.0 if pytestconfig.getoption("--long") else 10.0
    # A cache for two of four contexts and a queue for a few requests: evictions and 429s are part of it.
    with process(tiny_model, context_cache_bytes=500_000, max_queued_tokens=6000, batch_tokens=512) as (server, url):
        clients = [TeacherClient(url, f"run-{n % RUNS}", 60) for n in range(CLIENTS)]
        fingerprint = (await clients[0].info()).tokenizer_fingerprint
        contexts = [Context(context_hash(fingerprint, ids), ids) for ids in (tokens(n, 150 + 20 * n) for n in range(4))]
        pool = questions(tiny_model, contexts)
        for context in contexts:
            await clients[0].put_context(context)
        resident = psutil.Process(server.pid).memory_info

        async def held() -> float:
            """Resident memory without the replies in the cache, which is bounded."""
            return resident().rss - (await asyncio.to_thread(series, url))["opcd_teacher_reply_bytes"]

        began = time.monotonic()
        asked = [asyncio.create_task(ask(c, pool, n, began + duration_s)) for n, c in enumerate(clients)]
        await asyncio.sleep(duration_s / 4)
        warm = await held()
        answers = sum(await asyncio.gather(*asked))
        grown = await held() - warm
        seen = await asyncio.to_thread(series, url)
        for client in clients:
            await client.close()
    statuses: dict[str, float] = {}
    for name, value in seen.items():
        if name.startswith("opcd_teacher_requests_total"):
            status = name.rpartition('status="')[2][:3]
            statuses[status] = statuses.get(status, 0) + value
    print(f"{answers} answers, by status {statuses}, memory grew by {grown / 1e6:.1f} from {warm / 1e6:.0f} MB")
    assert set(statuses) == {"200", "429"}
    assert statuses["429"] > 0
    assert seen["opcd_teacher_context_cache_evictions"] > 0
    assert all(seen[f'opcd_teacher_requests_total{{run="anonymous/run-{n}",status="200"}}'] > 0 for n in range(RUNS))
    assert grown < GROWTH_BYTES
