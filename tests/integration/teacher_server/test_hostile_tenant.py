"""A tenant that loads the server in every allowed way delays another tenant's single request by at most four times, and
takes no more memory than the server's limits.

The attackers take CPU time, which would delay the request on a machine of two cores. So the same attackers first attack
a second server, a decoy: the quiet time is the request's time meanwhile. The two take turns.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil

from common.config.model import TeacherConfig
from teacher_server.http.app import MAX_BODIES, REPLY_CACHE_BYTES
from teacher_server.http.auth import key_digest
from teacher_server.http.bodies import memory_of
from tests.support.teacher_running import KEYS, items, process, scored

LIMITS = {"max_body_bytes": 1 << 20, "context_cache_bytes": 16 << 20}
REQUESTS, ROUNDS = 5, 4
WORKERS = 14


class Hostile:
    """A hostile tenant at work on the server at `url`, from a process that can be paused."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "tests.support.hostile_tenant", url, KEYS["red"]]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert "" not in {self._process.stdout.readline() for _ in range(WORKERS)}
        self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """It attacks inside this scope. The server works off the rest of the attack in a second after it."""
        assert self._process.poll() is None
        self._process.send_signal(signal.SIGCONT)
        time.sleep(1)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)
            time.sleep(1)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


async def durations(http: httpx.AsyncClient, first: int) -> list[float]:
    """Seconds of `REQUESTS` single requests, one after the other."""
    found = []
    for number in range(REQUESTS):
        batch = items(first + number, 8, prompt=16, response=64)
        began = time.monotonic()
        await scored(http, batch)
        found.append(time.monotonic() - began)
    return found


async def test_another_tenant_waits_at_most_four_times_as_long(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("".join(f"{tenant} {key_digest(key)}\n" for tenant, key in KEYS.items()))
    settings = {**LIMITS, "allow_anonymous": False, "server_keys_file": str(tmp_path / "keys")}
    with process(tiny_model, **settings) as (server, url), process(tiny_model, **settings) as (_, decoy_url):
        headers = {"Authorization": f"Bearer {KEYS['blue']}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
            await durations(http, 0)  # what the first requests allocate is not the attack's
            alone = statistics.median(await durations(http, 500))
            before = psutil.Process(server.pid).memory_info().rss
            quiet, attacked = [], []
            with closing(Hostile(url)) as attack, closing(Hostile(decoy_url)) as decoy:
                for number in range(ROUNDS):
                    with decoy.at_work():
                        quiet += await durations(http, 1000 + 100 * number)
                    with attack.at_work():
                        attacked += await durations(http, 2000 + 100 * number)
                        grown = psutil.Process(server.pid).memory_info().rss - before
    ratio = statistics.median(attacked) / statistics.median(quiet)
    limits = TeacherConfig(model="", **LIMITS)
    bodies = MAX_BODIES * (memory_of(limits.max_body_bytes, limits.max_items) + limits.max_body_bytes)
    budget = bodies + REPLY_CACHE_BYTES + limits.context_cache_bytes
    print(f"{ratio:.2f} x {1e3 * statistics.median(quiet):.0f} ms; with idle cores it takes {1e3 * alone:.0f} ms")
    print(f"memory grew by {grown / 1e6:.0f} of {budget / 1e6:.0f} MB")
    assert ratio <= 4
    assert grown <= 1.2 * budget
