"""Steps whose details a run keeps: all of a short run, a bounded number of a long one."""

from __future__ import annotations

from common.telemetry.kept_steps import MIN_TRACE_STEPS, TRACE_ANSWERS, keeps_details, keeps_trace


def kept(whole: int, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if keeps_details(step, whole)]


def test_all_early_steps_are_kept_then_ever_fewer() -> None:
    assert kept(4, 32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert kept(100, 100) == list(range(1, 101))
    assert kept(21, 30) == [*range(1, 22), 22, 24, 26, 28, 30]  # with an odd number the last of the first steps counts


def test_a_run_a_hundred_times_longer_keeps_a_few_times_more() -> None:
    assert len(kept(100, 10_000)) < 4.5 * len(kept(100, 100))
    assert len(kept(100, 1_000_000)) < 8 * len(kept(100, 100))


def test_the_timeline_of_10_000_steps_is_bounded_whatever_a_step_holds() -> None:
    for answers in (1, 16, 128, 1024):
        steps = sum(keeps_trace(step, answers) for step in range(1, 10_001))
        assert steps * answers <= 6 * TRACE_ANSWERS
    assert all(keeps_trace(step, 1_000_000) for step in range(1, MIN_TRACE_STEPS + 1))
