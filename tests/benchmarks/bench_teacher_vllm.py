"""The teacher beside what users of vLLM have: prompt log-probs over vLLM's own HTTP server.

SmolLM2-135M, 16 samples of 16 prompt and 64 response tokens, k = 256, with 1,024 tokens of context and with none; two
servers on loopback, one idle while the other answers, rounds alternating.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np

from common.protocol.schema import Context, Ids, ItemScore, ScoreItem, as_ids, context_hash
from teacher_server.client import TeacherClient
from tests.benchmarks.bench_teacher import K, make_items
from tests.benchmarks.e2e_runs import MODEL
from tests.benchmarks.figures import THREADS, Figure, Figures
from tests.support.processes import free_port
from tests.support.teacher_running import process

SAMPLES, CONTEXT = 16, 1024
ROUNDS = 3


def run() -> Figures:
    """Both figures."""
    with vllm_server() as theirs, process(MODEL, threads=THREADS, max_k=K) as (_, ours):
        return {
            **compared(
                ours,
                theirs,
                name="teacher.vs_vllm_no_context",
                target=1,
                context=0,
            ),
            **compared(
                ours,
                theirs,
                name="teacher.vs_vllm_prompt_logprobs",
                target=8,
                context=CONTEXT,
            ),
        }


def compared(ours: str, theirs: str, *, name: str, target: int, context: int) -> Figures:
    """Scored tokens a second of our server over those of vLLM's, the same sequences in both."""
    lead = as_ids(np.random.default_rng(1).integers(0, 49_152, context))
    items = make_items(SAMPLES)
    asyncio.run(score_ours(ours, items, lead))  # the context goes into the cache
    asyncio.run(score_theirs(theirs, items[:1], lead))
    here, there = [], []
    for _ in range(ROUNDS):
        here.append(asyncio.run(score_ours(ours, items, lead)))
        there.append(asyncio.run(score_theirs(theirs, items, lead)))
    seconds = statistics.median(here), statistics.median(there)
    ratio = statistics.median(b / a for a, b in zip(here, there, strict=True))
    tokens = sum(item.response_ids.size for item in items)
    how = (
        f"{SAMPLES} samples under {context} tokens of context: {tokens / seconds[0]:.0f} scored tokens/s over our HTTP "
        f"(at the student's ids, context cache warm), {tokens / seconds[1]:.1f} over vLLM's (prompt_logprobs={K}, 16 "
        f"requests at once, JSON read), float32; median ratio of {ROUNDS} rounds, alternating"
    )
    return {name: Figure(ratio, "x", how, at_least=target)}


async def score_ours(url: str, items: list[ScoreItem], lead: Ids) -> float:
    """Seconds of one call of the client."""
    client = TeacherClient(url, "bench", 600)
    name = None
    if lead.size:
        context = Context(context_hash((await client.info()).tokenizer_fingerprint, lead), lead)
        await client.put_context(context)
        name = context.hash
    batch = [ScoreItem(name, item.prompt_ids, item.response_ids, item.topk_ids) for item in items]
    began = time.perf_counter()
    response = await client.score(batch, "at_ids", 1.0, K)
    took = time.perf_counter() - began
    await client.close()
    assert all(isinstance(result, ItemScore) for result in response.results)
    return took


async def score_theirs(url: str, items: list[ScoreItem], lead: Ids) -> float:
    """Seconds until the log-probs of all samples are there as numbers, all requests at once."""

    async def one(http: httpx.AsyncClient, item: ScoreItem) -> None:
        prompt = np.concatenate([lead, item.prompt_ids, item.response_ids]).tolist()
        body = {"model": "teacher", "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": K}
        reply = await http.post("/v1/completions", json=body)
        reply.raise_for_status()
        rows = json.loads(reply.content)["choices"][0]["prompt_logprobs"]
        assert len(rows) == len(prompt)
        assert all(len(row) >= K for row in rows[-item.response_ids.size :])

    async with httpx.AsyncClient(base_url=url, timeout=900, trust_env=False) as http:
        began = time.perf_counter()
        await asyncio.gather(*(one(http, item) for item in items))
        return time.perf_counter() - began


@contextmanager
def vllm_server() -> Iterator[str]:
    """vLLM's OpenAI-compatible server around the same model: its address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
    command += ["--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-logprobs", str(K), "--max-model-len", "2048", "--enforce-eager"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(THREADS),
    }
    url = f"http://127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_until_up(url, started, Path(log.name))
            yield url
        finally:
            started.terminate()
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()


def _wait_until_up(url: str, started: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if started.poll() is not None:
            raise RuntimeError(f"vLLM's server ended with {started.returncode}:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(url + "/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError("vLLM's server did not come up")
