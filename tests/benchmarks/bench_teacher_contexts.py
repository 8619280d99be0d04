"""Many contexts at one teacher: what mixing them costs, and how much of a shared parent is computed again.

SmolLM2-135M over HTTP, about five minutes on two idle cores.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from common.protocol.schema import Context, ScoreItem, ScoreMode, as_ids, context_hash
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.client import TeacherClient
from tests.benchmarks.bench_teacher import IDENTITY, K, make_items, served
from tests.benchmarks.e2e_runs import MODEL
from tests.benchmarks.figures import THREADS, Figure, Figures
from tests.support.tiny import make_tiny_model

CONTEXTS, TOKENS, USES = 48, 256, 4
"""Contexts, tokens of each, and samples scored under each."""
REQUEST_ITEMS = 16
CHILDREN, PARENT_TOKENS, CHILD_TOKENS = 1000, 1024, 8


def run() -> Figures:
    """Both figures."""
    torch.set_num_threads(THREADS)
    backend = TransformersBackend.load(str(MODEL))
    return {**hit_cost(backend), **parent_share()}


def hit_cost(backend: TransformersBackend) -> Figures:
    """Seconds of samples under many contexts in random order, over those of the contexts and of the samples alone."""
    rng = np.random.default_rng(3)
    contexts = [named(rng.integers(0, 49_152, TOKENS)) for _ in range(CONTEXTS)]
    one = named(rng.integers(0, 49_152, TOKENS))
    items = make_items(CONTEXTS * USES)
    order = [context for context in contexts for _ in range(USES)]
    random.Random(0).shuffle(order)
    mixed = [under(context, item) for context, item in zip(order, items, strict=True)]
    same = [under(one, item) for item in items]
    with served(backend, batch_window_ms=0) as url:
        asyncio.run(score(url, [one], same[:REQUEST_ITEMS]))  # its context goes into the cache
        alone = asyncio.run(score(url, [one], same))
        together = asyncio.run(score(url, contexts, mixed))
    began = time.perf_counter()
    for context in contexts:
        backend.prefill([context.ids], None)
    computing = time.perf_counter() - began
    ratio = together / (alone + computing)
    how = (
        f"{CONTEXTS} contexts of {TOKENS} tokens, {USES} samples under each in random order, {REQUEST_ITEMS} a "
        f"request: {together:.1f} s; the samples under one cached context {alone:.1f} s, the contexts one by one "
        f"{computing:.1f} s"
    )
    return {"teacher.contexts_hit_cost": Figure(ratio, "x", how, at_most=1.15, limit="1: nothing is computed twice")}


def parent_share() -> Figures:
    """Context tokens computed over distinct ones, when many contexts share a parent; of a tiny model."""
    with TemporaryDirectory(prefix="bench-contexts-") as folder:
        backend = TransformersBackend.load(str(make_tiny_model(Path(folder) / "tiny")), max_sequence_tokens=2048)
        rng = np.random.default_rng(4)
        parent = named(rng.integers(0, backend.vocab_size, PARENT_TOKENS))
        children = [
            named(np.concatenate([parent.ids, rng.integers(0, backend.vocab_size, CHILD_TOKENS)]), parent)
            for _ in range(CHILDREN)
        ]
        ids = as_ids(rng.integers(0, backend.vocab_size, 4))
        items = [ScoreItem(context.hash, ids, ids, None) for context in random.Random(0).sample(children, CHILDREN)]
        with served(backend, batch_window_ms=0) as url:
            asyncio.run(score(url, [parent, *children], items, mode="sampled"))
            computed = computed_tokens(url)
    distinct = PARENT_TOKENS + CHILDREN * CHILD_TOKENS
    how = f"{CHILDREN} contexts of {CHILD_TOKENS} tokens after a parent of {PARENT_TOKENS}: {computed} tokens computed"
    figure = Figure(computed / distinct, "x", how, at_most=1.05, limit="1: every token once")
    return {"teacher.parent_share": figure}


def named(ids: np.ndarray, parent: Context | None = None) -> Context:
    """A context of `ids`, its parent's included."""
    return Context(context_hash(IDENTITY.tokenizer, as_ids(ids)), as_ids(ids), None if parent is None else parent.hash)


def under(context: Context, item: ScoreItem) -> ScoreItem:
    """The item with a context."""
    return replace(item, context=context.hash)


async def score(url: str, contexts: Sequence[Context], items: Sequence[ScoreItem], mode: ScoreMode = "at_ids") -> float:
    """Seconds to score `items`, all requests at once, after their contexts have been put."""
    client = TeacherClient(url, "bench", 600)
    try:
        for context in contexts:
            await client.put_context(context)
        began = time.perf_counter()
        starts = range(0, len(items), REQUEST_ITEMS)
        k = K if mode == "at_ids" else 0
        await asyncio.gather(*(client.score(items[n : n + REQUEST_ITEMS], mode, 1.0, k) for n in starts))
        return time.perf_counter() - began
    finally:
        await client.close()


def computed_tokens(url: str) -> int:
    """Context tokens that the server has run through the model."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return sum(
        int(float(value)) for value in re.findall(r"^opcd_teacher_context_tokens_computed_total\S* (\S+)$", text, re.M)
    )
