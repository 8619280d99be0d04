"""Work of several tenants in threads: one piece at a time for each tenant."""

from __future__ import annotations

import asyncio
import threading

import pytest

from teacher_server.scoring.turns import Turns


class Work:
    """Blocks until opened; records how many run at a time."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.running = self.most = self.ended = 0

    def __call__(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.open.wait(10)
        self.running -= 1
        self.ended += 1


async def test_a_tenant_has_one_thread_and_another_tenant_does_not_wait() -> None:
    turns, work = Turns(), Work()
    many = [asyncio.create_task(turns.run("hostile", work)) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert await asyncio.wait_for(turns.run("honest", lambda: 7), 5) == 7
    work.open.set()
    await asyncio.gather(*many)
    assert (work.most, work.ended) == (1, 20)


async def test_cancelled_callers_free_no_turn_early() -> None:
    """A client that disconnects again and again would otherwise fill all threads."""
    turns, work = Turns(), Work()
    for _ in range(5):
        task = asyncio.create_task(turns.run("hostile", work))
        await asyncio.sleep(0.02)
        task.cancel()
    assert work.running == 1
    last = asyncio.create_task(turns.run("hostile", work))
    work.open.set()
    await asyncio.wait_for(last, 5)
    assert (work.most, work.ended) == (1, 2)


async def test_a_failure_reaches_its_caller_and_ends_the_turn() -> None:
    turns = Turns()

    def fails() -> None:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        await turns.run("t", fails)
    assert await asyncio.wait_for(turns.run("t", lambda: 1), 5) == 1
