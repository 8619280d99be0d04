"""Room for bodies: who waits, who goes first, and that nothing stays taken."""

from __future__ import annotations

import asyncio

import pytest

from teacher_server.http.bodies import BodyBudget


async def hold(budget: BodyBudget, tenant: str, size: int, order: list[str], name: str, go: asyncio.Event) -> None:
    async with budget.room(tenant, size):
        order.append(name)
        await go.wait()


async def test_first_come_first_served_within_a_tenants_half() -> None:
    budget, order = BodyBudget(100), []
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
    assert (budget.held, budget._by_tenant, budget._waiting) == (0, {}, [])


async def test_one_body_larger_than_all_room_is_taken_alone() -> None:
    budget, order, go = BodyBudget(100), [], asyncio.Event()
    tasks = [asyncio.create_task(hold(budget, tenant, 150, order, tenant, go)) for tenant in "ab"]
    await asyncio.sleep(0.01)
    assert order == ["a"]
    go.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "b"]


async def test_who_leaves_the_queue_makes_room_for_those_behind() -> None:
    budget, order, go = BodyBudget(100), [], asyncio.Event()
    first = asyncio.create_task(hold(budget, "a", 60, order, "first", go))
    await asyncio.sleep(0)
    large = asyncio.create_task(hold(budget, "b", 50, order, "large", go))
    small = asyncio.create_task(hold(budget, "c", 10, order, "small", go))
    await asyncio.sleep(0.01)
    assert order == ["first"]
    large.cancel()
    await asyncio.sleep(0.01)
    assert order == ["first", "small"]
    go.set()
    await asyncio.gather(first, small)
    with pytest.raises(asyncio.CancelledError):
        await large
    assert (budget.held, budget._waiting) == (0, [])
