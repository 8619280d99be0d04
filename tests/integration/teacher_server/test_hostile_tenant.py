"""A tenant that loads the server in every allowed way delays another tenant's single request by at most four times, and
takes no more memory than the server's limits.

The attackers take CPU time, which would delay the request on a machine of two cores. So the same attackers first attack
a second server, a decoy: the quiet time is the request's time meanwhile.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from common.config.model import TeacherConfig
from teacher_server.http.app import MAX_BODIES, REPLY_CACHE_BYTES
from teacher_server.http.auth import key_digest
from teacher_server.http.bodies import memory_of
from tests.support.teacher_running import KEYS, items, process, scored

LIMITS = {"max_body_bytes": 1 << 20, "context_cache_bytes": 16 << 20}
REQUESTS = 15
WORKERS = 14


@contextmanager
def hostile(url: str) -> Iterator[None]:
    """A hostile tenant at work on the server at `url`."""
    command = [sys.executable, "-m", "tests.support.hostile_tenant", url, KEYS["red"]]
    attack = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert attack.stdout is not None
        assert "" not in {attack.stdout.readline() for _ in range(WORKERS)}
        yield
        assert attack.poll() is None
    finally:
        attack.kill()
        attack.wait()


async def median_s(http: httpx.AsyncClient, first: int) -> float:
    """Median duration of `REQUESTS` single requests, one after the other."""
    found = []
    for number in range(REQUESTS):
        batch = items(first + number, 8, prompt=16, response=64)
        began = time.monotonic()
        await scored(http, batch)
        found.append(time.monotonic() - began)
    return statistics.median(found)


async def test_another_tenant_waits_at_most_four_times_as_long(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("".join(f"{tenant} {key_digest(key)}\n" for tenant, key in KEYS.items()))
    settings = {**LIMITS, "allow_anonymous": False, "server_keys_file": str(tmp_path / "keys")}
    with process(tiny_model, **settings) as (server, url), process(tiny_model, **settings) as (_, decoy):
        headers = {"Authorization": f"Bearer {KEYS['blue']}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
            await median_s(http, 0)  # what the first requests allocate is not the attack's
            alone = await median_s(http, 500)
            before = psutil.Process(server.pid).memory_info().rss
            with hostile(decoy):
                quiet = await median_s(http, 1000)
            with hostile(url):
                attacked = await median_s(http, 2000)
                grown = psutil.Process(server.pid).memory_info().rss - before
    limits = TeacherConfig(model="", **LIMITS)
    bodies = MAX_BODIES * (memory_of(limits.max_body_bytes, limits.max_items) + limits.max_body_bytes)
    budget = bodies + REPLY_CACHE_BYTES + limits.context_cache_bytes
    print(f"{attacked / quiet:.2f} x {quiet * 1e3:.0f} ms; with idle cores it takes {alone * 1e3:.0f} ms")
    print(f"memory grew by {grown / 1e6:.0f} of {budget / 1e6:.0f} MB")
    assert attacked <= 4 * quiet
    assert grown <= 1.2 * budget
