"""Order of service of the fair queue, under load and under attack."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from typing import TypeVar

import pytest

from teacher_server.scoring.fair_queue import MAX_RUNS, FairQueue, Ticket

T = TypeVar("T")


def drain(queue: FairQueue[str], count: int | None = None) -> list[str]:
    return list(iter(queue.pop, None)) if count is None else [take(queue) for _ in range(count)]


def take(queue: FairQueue[T]) -> T:
    item = queue.pop()
    assert item is not None
    return item


def test_an_item_above_the_limit_stays_next() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("t", "a", "large", 100)
    queue.push("t", "b", "small", 10)
    assert queue.pop(lambda item: item == "small") is None
    assert queue.tokens == 110
    assert queue.pop(lambda item: item == "large") == "large"
    assert queue.pop() == "small"


def test_one_run_is_first_in_first_out() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.push("t", "r", name, 10)
    assert drain(queue) == ["a", "b", "c"]
    assert queue.pop() is None


@pytest.mark.parametrize("served", [10, 11, 12, 500])
@pytest.mark.parametrize("tokens", [10, 100, 5000])
def test_a_newcomer_is_next_whatever_waits(served: int, tokens: int) -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.push("t", f"flood-{i % 3}", "flood", 100)
    drain(queue, served)
    queue.push("t", "quiet", "quiet", tokens)
    assert queue.pop() == "quiet"


def test_a_new_tenant_is_next_whatever_waits() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.push("flood", f"flood-{i % 30}", "flood", 100)
    drain(queue, 50)
    queue.push("quiet", "r", "quiet", 100)
    assert queue.pop() == "quiet"


@pytest.mark.parametrize(("tokens", "others"), [(100, 8), (1000, 40)])
def test_a_run_within_its_share_is_next_whenever_it_returns(tokens: int, others: int) -> None:
    """A quarter of the tokens is its share; it asks for less, in small items or in large ones."""
    queue: FairQueue[str] = FairQueue()
    for i in range(3000):
        queue.push("t", f"flood-{i % 3}", "flood", 100)
    drain(queue, 7)
    for _ in range(20):
        queue.push("t", "quiet", "quiet", tokens)
        assert queue.pop() == "quiet"
        assert set(drain(queue, others)) == {"flood"}


def test_tenants_share_by_tokens_not_by_runs_or_items() -> None:
    """One tenant has eight runs of long items, the other a single run of short items: half of the tokens each."""
    queue: FairQueue[str] = FairQueue()
    for i in range(400):
        queue.push("many", str(i % 8), "many", 50)
    for _ in range(4000):
        queue.push("one", "r", "one", 5)
    served = Counter[str]()
    for _ in range(1100):
        name = take(queue)
        served[name] += 50 if name == "many" else 5
    assert abs(served["many"] - served["one"]) <= 50


@pytest.mark.parametrize(("long", "short"), [(30, 10), (3000, 10)])
def test_runs_of_a_tenant_share_by_tokens(long: int, short: int) -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("t", "long", "long", long)
    for _ in range(100 * long // short):
        queue.push("t", "short", "short", short)
    taken = Counter(drain(queue, 50 * (1 + long // short)))
    assert abs(long * taken["long"] - short * taken["short"]) <= long


def test_equal_runs_are_served_equally_from_the_start() -> None:
    """Four runs of 16 clients each, one request in flight a client, batches of 500 tokens; the runs start in order."""
    queue: FairQueue[int] = FairQueue()
    for run in range(4):
        for _ in range(16):
            queue.push("t", f"{run}", run, 50)
    answers = Counter[int]()
    for _ in range(30):
        batch = [take(queue) for _ in range(10)]
        answers.update(batch)
        for run in batch:
            queue.push("t", f"{run}", run, 50)
        assert max(answers.values()) - min(answers[run] for run in range(4)) <= 1
    assert sum(answers.values()) == 300


def test_idling_saves_nothing_up() -> None:
    """A run that idled while others were served does not get the missed share afterwards."""
    queue: FairQueue[str] = FairQueue()
    queue.push("t", "a", "a", 10)
    queue.push("t", "b", "b", 10)
    for _ in range(400):
        queue.push("t", "a", "a", 10)
    drain(queue, 150)
    for _ in range(100):
        queue.push("t", "b", "b", 10)
    taken = Counter(drain(queue, 80))
    assert abs(taken["a"] - taken["b"]) <= 1


@pytest.mark.parametrize("tokens", [100, 1000])
@pytest.mark.parametrize("pause", [0, 1, 3])
def test_coming_back_after_each_item_is_no_advantage(tokens: int, pause: int) -> None:
    """One large item in flight at a time gets at most half of the tokens while small items wait."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(40_000):
        queue.push("t", "steady", "steady", 10)
    queue.push("t", "again", "again", tokens)
    served = Counter[str]()
    back_in = -1
    for _ in range(3000):
        if back_in == 0:
            queue.push("t", "again", "again", tokens)
        back_in -= 1
        name = take(queue)
        served[name] += tokens if name == "again" else 10
        if name == "again":
            back_in = pause
    assert served["again"] - served["steady"] <= tokens


def test_a_stream_of_new_names_does_not_starve_a_run() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push("t", "old", "old", 100)
    taken = []
    for i in range(50):
        queue.push("t", f"new-{i}", "new", 100)
        queue.push("t", f"newer-{i}", "new", 100)
        taken.append(take(queue))
    # One of n waiting runs gets one of n turns, and n grows by one a turn.
    assert taken.count("old") >= 4


def test_a_context_is_charged_to_its_tenant_and_to_none_of_its_runs() -> None:
    """The first run that needs a shared context does not pay for it alone."""
    queue: FairQueue[str] = FairQueue()
    queue.charge("t", 5000)  # no other tenant waits
    for _ in range(60):
        queue.push("t", "a", "a", 100)
        queue.push("t", "b", "b", 100)
        queue.push("u", "c", "c", 100)
    assert queue.pop() == "a"
    queue.charge("t", 2000)
    taken = Counter(drain(queue, 60))
    assert taken["c"] == pytest.approx(40, abs=2)
    assert taken["a"] == pytest.approx(taken["b"], abs=2)
    queue.charge("idle", 1000)
    queue.push("idle", "r", "idle", 100)
    assert 20 <= drain(queue).index("idle") <= 24  # the two others get 1,000 tokens each first


def test_counts_survive_any_order_of_calls() -> None:
    rng = random.Random(0)
    queue: FairQueue[object] = FairQueue()
    waiting: dict[int, tuple[str, str, Ticket, int]] = {}
    items: list[object] = []  # keeps them alive: their ids are the keys
    for _ in range(3000):
        action = rng.random()
        if action < 0.5:
            tenant, run, tokens, item = rng.choice("xy"), rng.choice("abc"), rng.randint(1, 300), object()
            items.append(item)
            waiting[id(item)] = (tenant, run, queue.push(tenant, run, item, tokens), tokens)
        elif action < 0.8 and waiting:
            limit = rng.randint(1, 300)
            if (popped := queue.pop(lambda item, limit=limit: waiting[id(item)][3] <= limit)) is not None:
                assert waiting.pop(id(popped))[3] <= limit
        elif waiting:
            tenant, run, _, _ = rng.choice(list(waiting.values()))
            gone = [key for key, entry in waiting.items() if entry[:2] == (tenant, run)][:2]
            queue.discard([waiting.pop(key)[2] for key in gone])
        assert queue.tokens == sum(entry[3] for entry in waiting.values())
        assert queue.waiting_runs == len({entry[:2] for entry in waiting.values()})
        for tenant in "xy":
            assert queue.waiting_tokens(tenant) == sum(e[3] for e in waiting.values() if e[0] == tenant)
    left = [id(item) for item in iter(queue.pop, None)]
    assert sorted(left) == sorted(waiting)


class Name(str):
    """A name whose lifetime can be observed."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_names_do_not_pile_up(tokens: int) -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("t", "long", "x", tokens)
    alive: weakref.WeakSet[Name] = weakref.WeakSet()
    for i in range(1000):
        run, tenant = Name(f"run-{i}"), Name(f"tenant-{i}")
        alive.update((run, tenant))
        queue.push("t", run, "y", tokens)
        queue.push(tenant, "r", "z", tokens)
        drain(queue, 2)
    del run, tenant
    assert len(alive) < 20


def test_a_tenant_with_thousands_of_run_names_makes_no_turn_dearer() -> None:
    """Every turn looks at all waiting runs: names are free, so they must not become work for other tenants."""
    queue: FairQueue[str] = FairQueue()
    for i in range(5000):
        queue.push("hostile", f"{i}", "hostile", 10)
    assert queue.waiting_runs <= MAX_RUNS + 1
    drain(queue, 10)
    queue.push("honest", "run", "honest", 10)
    assert queue.pop() == "honest"
    assert len(drain(queue)) == 4990
