"""The byte budget: order of admission, shares of tenants, and release of everything."""

from __future__ import annotations

import asyncio
import tracemalloc

import numpy as np
import pytest

from common.protocol.codec import decode_request, encode_request
from common.protocol.schema import ScoreItem, as_ids
from teacher_server.http.bodies import ByteBudget, memory_of
from teacher_server.scoring.checks import RequestRefused
from tests.support.teacher_running import request_of


async def hold(budget: ByteBudget, tenant: str, size: int, order: list[str], name: str, go: asyncio.Event) -> None:
    async with budget.hold(tenant, size):
        order.append(name)
        await go.wait()


async def all_of_it_is_free(budget: ByteBudget) -> None:
    """Two tenants can hold one half each."""
    async with budget.hold("x", 50), budget.hold("y", 50):
        assert budget.held == 100


async def test_first_come_first_served_within_a_tenants_half() -> None:
    budget, order = ByteBudget(100), []
    events = {name: asyncio.Event() for name in ("a1", "a2", "b1", "c1", "c2")}
    sizes = {"a1": 50, "a2": 10, "b1": 40, "c1": 30, "c2": 5}
    tasks = []
    for name, size in sizes.items():
        tasks.append(asyncio.create_task(hold(budget, name[0], size, order, name, events[name])))
        await asyncio.sleep(0)
    # a2 waits for its own tenant and lets b1 pass; c1 has no room, and c2, though small, does not overtake it.
    assert order == ["a1", "b1"]
    events["b1"].set()
    await asyncio.sleep(0.01)
    assert order == ["a1", "b1", "c1", "c2"]
    events["a1"].set()
    await asyncio.sleep(0.01)
    assert order[-1] == "a2"
    for event in events.values():
        event.set()
    await asyncio.gather(*tasks)
    assert budget.held == 0
    await all_of_it_is_free(budget)


async def test_no_room_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refused one leaves the queue: the one behind it is admitted."""
    monkeypatch.setattr("teacher_server.http.bodies.WAIT_S", 0.05)
    budget, order, go = ByteBudget(100), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(budget, tenant, 50, order, tenant, go)) for tenant in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(RequestRefused, match="too many bytes") as caught:
        await hold(budget, "c", 10, order, "c", go)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
    go.set()
    await asyncio.gather(*tasks)
    await all_of_it_is_free(budget)


async def test_who_leaves_the_queue_makes_room_for_those_behind() -> None:
    budget, order, go = ByteBudget(100), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(budget, "a", 50, order, "first", go))]
    tasks.append(asyncio.create_task(hold(budget, "b", 20, order, "second", go)))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(budget, "c", 50, order, "large", go))
    tasks.append(asyncio.create_task(hold(budget, "d", 10, order, "small", go)))
    await asyncio.sleep(0.01)
    assert order == ["first", "second"]
    large.cancel()
    await asyncio.sleep(0.01)
    assert order == ["first", "second", "small"]
    go.set()
    await asyncio.gather(*tasks)
    with pytest.raises(asyncio.CancelledError):
        await large
    assert budget.held == 0
    await all_of_it_is_free(budget)


@pytest.mark.parametrize(("items", "prompt", "response", "k"), [(1, 16, 2000, 128), (1, 60_000, 1, 0), (1024, 1, 1, 1)])
def test_decoding_takes_no_more_memory_than_is_counted(items: int, prompt: int, response: int, k: int) -> None:
    """Few large arrays of 16-bit ids, one long prompt, and many tiny items."""
    rng = np.random.default_rng(0)
    batch = [
        ScoreItem(
            None,
            as_ids(rng.integers(0, 512, prompt)),
            as_ids(rng.integers(0, 512, response)),
            topk_ids=as_ids(rng.integers(0, 512, (response, k))) if k else None,
        )
        for _ in range(items)
    ]
    body = encode_request(request_of(batch, mode="at_ids" if k else "sampled", k=k))
    tracemalloc.start()
    decoded = decode_request(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(decoded.items) == items
    counted = memory_of(len(body), items)
    assert len(body) + peak <= counted
