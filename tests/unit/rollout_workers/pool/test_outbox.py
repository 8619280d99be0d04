"""A worker's end of its line: what waits for what, what shares a reply, what becomes of errors."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from rollout_workers.pool.failures import EngineLost
from rollout_workers.pool.outbox import Order, Outbox

SLACK_S = 2.0
"""For a machine that has other things to do."""


@pytest.fixture
def every_s(monkeypatch: pytest.MonkeyPatch) -> float:
    """Replies half a second apart."""
    monkeypatch.setattr("rollout_workers.pool.outbox.REPLY_EVERY_S", 0.5)
    return 0.5


class Work:
    """Answers end when the test says so; a sample that is an exception is raised."""

    def __init__(self) -> None:
        self.ends: dict[Any, asyncio.Event] = {}
        self.cancelled: list[Any] = []
        self.outbox = Outbox(self._make)

    async def _make(self, order: Order) -> tuple[Any, Any]:
        try:
            await self.ends.setdefault(order.sample, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(order.sample)
            raise
        if isinstance(order.sample, Exception):
            raise order.sample
        return f"summary {order.sample}", f"item {order.sample}"

    async def begin(self, *samples: Any) -> None:
        assert await self.outbox.exchange([Order(i, s, True) for i, s in enumerate(samples)], [], 0) == []
        await asyncio.sleep(0)

    def end(self, *samples: Any) -> None:
        for sample in samples:
            self.ends[sample].set()


def tickets(reply: list[Any]) -> list[int]:
    return [outcome.ticket for outcome in reply[0]]


async def test_an_answer_that_is_done_does_not_wait_for_the_others() -> None:
    work = Work()
    await work.begin("fast", "slow")
    work.end("fast")
    outcomes, *items = await asyncio.wait_for(work.outbox.exchange([], [], 2), SLACK_S)
    assert [(one.ticket, one.summary, one.error) for one in outcomes] == [(0, "summary fast", None)]
    assert items == ["item fast", None]  # as many as the call has returns


async def test_what_ended_comes_together_as_far_as_there_is_room() -> None:
    work = Work()
    await work.begin(*"abc")
    work.end(*"abc")
    assert tickets(await work.outbox.exchange([], [], 2)) == [0, 1]
    outcomes, *items = await work.outbox.exchange([], [], 2)
    assert ([one.ticket for one in outcomes], items) == ([2], ["item c", None])


async def test_answers_that_end_one_after_the_other_share_a_reply(every_s: float) -> None:
    work = Work()
    await work.begin(*"abc")
    work.end("a")
    await work.outbox.exchange([], [], 3)
    begun = time.monotonic()
    collecting = asyncio.create_task(work.outbox.exchange([], [], 3))
    work.end("b")
    await asyncio.sleep(every_s / 50)
    work.end("c")
    assert tickets(await collecting) == [1, 2]
    assert every_s / 2 < time.monotonic() - begun < SLACK_S


async def test_a_reply_that_is_full_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_workers.pool.outbox.REPLY_EVERY_S", 60.0)
    work = Work()
    await work.begin(*"abc")
    work.end(*"abc")
    await work.outbox.exchange([], [], 1)
    assert tickets(await asyncio.wait_for(work.outbox.exchange([], [], 2), SLACK_S)) == [1, 2]


async def test_what_is_given_up_is_stopped_and_never_comes() -> None:
    work = Work()
    await work.begin(*"abc")
    work.end("a")
    await asyncio.sleep(0.01)  # it waits to be collected
    work.end("c")
    assert tickets(await work.outbox.exchange([], [0, 1], 3)) == [2]
    assert work.cancelled == ["b"]


async def test_what_is_given_up_while_a_call_waits_leaves_it_waiting(every_s: float) -> None:
    work = Work()
    await work.begin(*"abc")
    work.end("a")
    await work.outbox.exchange([], [], 3)
    work.end("b")
    collecting = asyncio.create_task(work.outbox.exchange([], [], 3))
    await asyncio.sleep(every_s / 50)  # b has ended, its reply is not due yet
    await work.outbox.exchange([], [1], 0)
    await asyncio.sleep(1.5 * every_s)
    assert not collecting.done()
    work.end("c")
    assert tickets(await asyncio.wait_for(collecting, SLACK_S)) == [2]


async def test_an_error_is_the_outcome_of_its_order_alone() -> None:
    work, error = Work(), LookupError("no such row")
    await work.begin(error, "well")
    work.end(error, "well")
    outcomes, *items = await work.outbox.exchange([], [], 2)
    assert [one.ticket for one in outcomes] == [0, 1]
    assert items == [None, "item well"]
    with pytest.raises(LookupError, match="no such row"):
        raise outcomes[0].error.as_instanceof_cause()


async def test_a_lost_engine_is_raised_to_the_call_that_waits() -> None:
    work, error = Work(), EngineLost("gone")
    await work.begin(error, "well")
    collecting = asyncio.create_task(work.outbox.exchange([], [], 2))
    await asyncio.sleep(0)
    work.end(error)
    with pytest.raises(EngineLost, match="gone"):
        await asyncio.wait_for(collecting, SLACK_S)
