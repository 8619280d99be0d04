"""Token budgets of the next batch, worked out by hand."""

from __future__ import annotations

import pytest

from teacher_server.scoring.batch_size import BatchSizer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sizer(clock: Clock) -> BatchSizer:
    return BatchSizer(10_000, clock)


def test_batches_are_shorter_while_several_runs_wait(sizer: BatchSizer) -> None:
    """At 2,000 tokens a second: two seconds for one run, 0.15 s for several, never under the minimum."""
    sizer.tokens_per_s = 2000.0
    assert [sizer.tokens(waiting) for waiting in (0, 1, 2, 3)] == [4000, 4000, 300, 300]
    sizer.tokens_per_s = 100.0
    assert sizer.tokens(2) == 128


def test_batches_are_longer_while_one_run_is_active(sizer: BatchSizer, clock: Clock) -> None:
    """Two seconds of work until another run asks, and again a minute after the other run's last request."""
    budgets = []
    for run in ("one", "two", "one"):
        sizer.record_request("t", run)
        budgets.append(sizer.tokens(1))
    assert budgets == [2000, 500, 500]
    clock.now = 61
    sizer.record_request("t", "one")
    assert sizer.tokens(1) == 2000
    assert sizer.active_runs() == 1


def test_the_same_name_of_two_tenants_is_two_runs(sizer: BatchSizer) -> None:
    sizer.record_request("t", "one")
    sizer.record_request("u", "one")
    assert sizer.active_runs() == 2


def test_batches_are_short_while_another_tenant_is_active(sizer: BatchSizer, clock: Clock) -> None:
    """A newcomer waits for one batch of the other tenant, so that batch is short."""
    sizer.tokens_per_s = 2000.0
    sizer.record_request("t", "one")
    sizer.record_request("u", "one")
    assert sizer.tokens(1) == 300
    clock.now = 61
    sizer.record_request("t", "one")
    assert sizer.tokens(1) == 4000


def test_the_configured_bound_holds() -> None:
    sizer = BatchSizer(50)
    assert sizer.tokens(1) == 50


def test_the_speed_follows_the_batches(sizer: BatchSizer) -> None:
    sizer.record_batch(0, 5.0)
    sizer.record_batch(100, 0.0)
    assert sizer.tokens_per_s == 1000
    for _ in range(50):
        sizer.record_batch(500, 0.1)
    assert sizer.tokens_per_s == pytest.approx(5000, rel=0.01)


def test_names_are_forgotten(sizer: BatchSizer, clock: Clock) -> None:
    for second in range(1000):
        clock.now = second
        sizer.record_request("t", f"run-{second}")
    assert sizer.active_runs() == 61
