"""Which worker answers next."""

from __future__ import annotations

from rollout_workers.pool.dispatch import Dispatch


def dispatch_of(*workers: int, slots: int = 4) -> Dispatch:
    dispatch = Dispatch(slots)
    for worker in workers:
        dispatch.join(worker)
    return dispatch


def test_the_least_loaded_worker_answers_by_tokens_not_by_number() -> None:
    dispatch = dispatch_of(0, 1)
    assert [dispatch.start("a", 100), dispatch.start("b", 10), dispatch.start("c", 10)] == [0, 1, 1]
    dispatch.end(0, 100)
    assert dispatch.start("d", 10) == 0


def test_samples_of_one_prompt_stay_together_until_that_costs_more_than_it_saves() -> None:
    dispatch = dispatch_of(0, 1, slots=100)
    first = [dispatch.start("same", 10) for _ in range(2)]
    assert first == [0, 0]  # its prefix is there
    assert dispatch.start("same", 10) == 1  # two answers ahead: another worker is the faster one


def test_slots_bound_what_is_in_flight() -> None:
    dispatch = dispatch_of(0, 1, slots=1)
    assert {dispatch.start("a", 5), dispatch.start("b", 5)} == {0, 1}
    assert dispatch.start("c", 5) is None
    assert dispatch.in_flight == 2
    dispatch.end(1, 5)
    assert dispatch.start("c", 5) == 1


def test_a_worker_that_left_gets_nothing_and_may_end_late() -> None:
    dispatch = dispatch_of(0, 1)
    dispatch.start("a", 5)
    dispatch.leave(0)
    dispatch.end(0, 5)
    assert dispatch.workers == (1,)
    assert dispatch.start("a", 5) == 1
    dispatch.join(2)
    assert dispatch.start("b", 5) == 2
