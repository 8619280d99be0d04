"""``python -m tests.support.hostile_tenant URL KEY``: load a teacher in every way that its limits allow, until killed.

Eight connections send requests of 1,024 tiny items, two put new chains of contexts and score under them, and four send
the largest bodies that are refused. Prints a line once all of them are at work.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from itertools import count

import httpx
import msgpack
import numpy as np

from common.protocol.codec import MEDIA_TYPE, encode_request
from common.protocol.schema import Context, as_ids, context_hash
from tests.support.teacher_running import items, put, request_of

CHAIN = 16


async def tiny_items(http: httpx.AsyncClient, seed: int) -> None:
    """One request whose items have two tokens each."""
    batch = items(seed, 1024, prompt=1, response=1)
    await http.post("/v1/score", content=encode_request(request_of(batch, k=8)))


async def chains(http: httpx.AsyncClient, seed: int) -> None:
    """One item under a new chain of contexts that add one token each."""
    fingerprint = (await http.get("/v1/info")).json()["tokenizer_fingerprint"]
    ids = np.random.default_rng(seed).integers(0, 512, CHAIN)
    parent = None
    for length in range(1, CHAIN + 1):
        context = Context(context_hash(fingerprint, as_ids(ids[:length])), as_ids(ids[:length]), parent)
        await put(http, context)
        parent = context.hash
    await http.post("/v1/score", content=encode_request(request_of(items(seed, 1, context=parent), k=8)))


async def refused(http: httpx.AsyncClient, seed: int) -> None:
    """One body of a megabyte whose `mode` is wrong."""
    await http.post("/v1/score", content=msgpack.packb({"v": 1, "mode": "x" * 1_000_000}))


async def repeat(call: Callable[[httpx.AsyncClient, int], Awaitable[None]], url: str, key: str, worker: int) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": MEDIA_TYPE}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
        for number in count():
            await call(http, worker * 100_000 + number)
            if number == 0:
                print(f"{call.__name__} {worker}", flush=True)


async def main(url: str, key: str) -> None:
    calls = [tiny_items] * 8 + [chains] * 2 + [refused] * 4
    await asyncio.gather(*(repeat(call, url, key, worker) for worker, call in enumerate(calls)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
