"""Whose turn it is, worked out by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from teacher_server.scoring.fair_queue import FairQueue


def drain(queue: FairQueue[str], count: int | None = None) -> list[str]:
    return [queue.pop() for _ in range(len(queue) if count is None else count)]


def test_one_run_is_first_in_first_out() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.push("t", "r", name, 10)
    assert drain(queue) == ["a", "b", "c"]
    with pytest.raises(IndexError):
        queue.pop()


def test_a_newcomer_is_next_whatever_waits() -> None:
    for served in (10, 11, 12, 500):
        queue: FairQueue[str] = FairQueue()
        for i in range(1000):
            queue.push("t", f"flood-{i % 3}", "flood", 100)
        drain(queue, served)
        queue.push("t", "quiet", "quiet", 100)
        assert queue.pop() == "quiet"


def test_who_comes_back_after_a_while_is_next_again() -> None:
    """As long as it asks for no more than its share: here an item in every five."""
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.push("t", f"flood-{i % 3}", "flood", 100)
    drain(queue, 7)
    for _ in range(20):
        queue.push("t", "quiet", "quiet", 100)
        assert queue.pop() == "quiet"
        assert set(drain(queue, 4)) == {"flood"}


def test_tenants_share_by_tokens_not_by_runs_or_items() -> None:
    """One tenant with eight runs of long items, one with a single run of short ones: half the tokens each."""
    queue: FairQueue[str] = FairQueue()
    for i in range(400):
        queue.push("many", str(i % 8), "many", 50)
    for _ in range(4000):
        queue.push("one", "r", "one", 5)
    served = Counter[str]()
    for _ in range(1100):
        name = queue.pop()
        served[name] += 50 if name == "many" else 5
    assert abs(served["many"] - served["one"]) <= 50


def test_runs_of_a_tenant_share_by_tokens() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(300):
        queue.push("t", "long", "long", 30)
        queue.push("t", "short", "short", 10)
    taken = Counter(drain(queue, 200))
    assert abs(30 * taken["long"] - 10 * taken["short"]) <= 30


def test_idling_saves_nothing_up() -> None:
    """Who idled while others were served does not get the missed share afterwards."""
    queue: FairQueue[str] = FairQueue()
    queue.push("t", "a", "a", 10)
    queue.push("t", "b", "b", 10)
    for _ in range(200):
        queue.push("t", "a", "a", 10)
    drain(queue, 150)
    for _ in range(50):
        queue.push("t", "b", "b", 10)
    taken = Counter(drain(queue, 40))
    assert abs(taken["a"] - taken["b"]) <= 2


def test_coming_back_after_each_item_is_no_advantage() -> None:
    """One item in flight at a time, each as large as ten of the other's: served is still about half."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(2000):
        queue.push("t", "steady", "steady", 10)
    queue.push("t", "again", "again", 100)
    served = Counter[str]()
    for _ in range(500):
        name = queue.pop()
        served[name] += 100 if name == "again" else 10
        if name == "again":
            queue.push("t", "again", "again", 100)
    assert abs(served["again"] - served["steady"]) <= 200


def test_a_stream_of_new_names_does_not_starve_a_run() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("t", "old", "old", 10)
    queue.push("t", "old", "old", 10)
    taken = []
    for i in range(20):
        queue.push("t", f"new-{i}", "new", 10)
        queue.push("t", f"newer-{i}", "new", 10)
        taken.append(queue.pop())
    assert taken.count("old") == 2


def test_charges_count() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(20):
        queue.push("t", "a", "a", 10)
        queue.push("t", "b", "b", 10)
    queue.charge("t", "a", 100)
    assert Counter(drain(queue, 10))["b"] >= 9
    queue.charge("nobody", "r", 5)


def test_counts_survive_any_order_of_calls() -> None:
    rng = random.Random(0)
    queue: FairQueue[object] = FairQueue()
    waiting: dict[int, tuple[str, str, object, int]] = {}
    for _ in range(3000):
        action = rng.random()
        if action < 0.5:
            tenant, run, tokens, item = rng.choice("xy"), rng.choice("abc"), rng.randint(1, 9), object()
            queue.push(tenant, run, item, tokens)
            waiting[id(item)] = (tenant, run, item, tokens)
        elif action < 0.8 and waiting:
            peeked = queue.peek_tokens()
            assert waiting.pop(id(queue.pop()))[3] == peeked
        elif waiting:
            tenant, run, _, _ = rng.choice(list(waiting.values()))
            gone = [e for e in waiting.values() if e[:2] == (tenant, run)][:2]
            queue.discard(tenant, run, [entry[2] for entry in gone])
            for entry in gone:
                del waiting[id(entry[2])]
        assert len(queue) == len(waiting) == len(list(queue))
        assert queue.tokens == sum(entry[3] for entry in waiting.values())
        for tenant in "xy":
            assert queue.waiting_tokens(tenant) == sum(e[3] for e in waiting.values() if e[0] == tenant)


def test_names_do_not_pile_up() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("t", "long", "x", 1)
    for i in range(1000):
        queue.push("t", f"run-{i}", "y", 1)
        queue.push(f"tenant-{i}", "r", "z", 1)
        drain(queue, 2)
    assert len(queue._root.members) < 10
    assert sum(len(owner.members) for owner in queue._root.members.values()) < 20
