"""Bubbles, wait shares and overlap of a step, from spans laid out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.telemetry.intervals import Interval, covered_s, difference, intersection, merged
from common.telemetry.step_times import StepTimes, step_times, total_times
from common.telemetry.trace import TraceSpan


def span(stage: str, start: float, end: float, track: str = "t") -> TraceSpan:
    return TraceSpan(stage, track, start, end)


def test_a_serial_step() -> None:
    times = step_times(
        [
            span("rollout", 0, 4),
            span("score", 4, 6),
            span("accumulate", 6, 8),
            span("step", 8, 8.5),
            span("sync", 8.5, 9),
            span("parity", 9, 9.25),
        ],
        (0, 10),
    )
    assert times.stage_s["rollout"] == 4
    assert times.trainer_idle_ratio == pytest.approx(0.75)
    assert times.wait_shares == pytest.approx(
        {"rollout": 0.4, "score": 0.2, "sync": 0.05, "parity": 0.025, "other": 0.075}
    )
    assert times.overlap_ratio == pytest.approx(0.925)


def test_a_stage_is_waited_for_only_while_none_before_it_works() -> None:
    # Answers trickle in: the teacher works all the time, but it is the rollouts that the learner waits for.
    times = step_times(
        [
            span("rollout", 0, 6),
            span("score", 1, 8),
            span("queue", 1, 9),
            span("accumulate", 3, 4),
            span("step", 9, 10),
        ],
        (0, 10),
    )
    assert times.trainer_idle_s == pytest.approx(8)
    assert times.wait_s == pytest.approx({"rollout": 5, "score": 2, "queue": 1, "other": 0})


def test_an_idle_moment_is_one_in_which_no_rank_computes() -> None:
    times = step_times([span("accumulate", 0, 4, "rank 0"), span("accumulate", 3, 8, "rank 1")], (0, 10))
    assert times.trainer_idle_ratio == pytest.approx(0.2)
    assert times.stage_s == {"accumulate": 8}


def test_depth_is_how_many_answers_were_at_a_stage_in_the_mean() -> None:
    spans = [
        span("rollout", 0, 4),
        span("rollout", 2, 6),
        span("queue", -1, 2),
        span("queue", 0, 3),
        span("score", 9, 12),
    ]
    times = step_times(spans, (0, 10))
    assert times.depths == pytest.approx({"queue": 0.5, "rollout": 0.8, "score": 0.1})
    assert times.metrics()["queue_depth/rollout"] == pytest.approx(0.8)
    assert (times + StepTimes(total_s=10)).depths["rollout"] == pytest.approx(0.4)


def test_perfect_overlap_counts_the_stages() -> None:
    times = step_times([span("rollout", 0, 2), span("score", 0, 2), span("accumulate", 0, 2)], (0, 2))
    assert times.overlap_ratio == pytest.approx(3)
    assert times.trainer_idle_ratio == 0


def test_lying_in_a_queue_is_no_work() -> None:
    assert step_times([span("rollout", 0, 2), span("queue", 0, 2)], (0, 2)).overlap_ratio == pytest.approx(1)


def test_what_lies_outside_the_step_is_cut_off() -> None:
    times = step_times([span("rollout", -5, 1), span("accumulate", 1, 7)], (0, 4))
    assert times.stage_s == {"rollout": 1, "accumulate": 3}
    assert times.total_s == 4


def test_an_unknown_stage_is_waited_for_last() -> None:
    times = step_times([span("checkpoint", 0, 4), span("rollout", 0, 1)], (0, 4))
    assert times.wait_s == pytest.approx({"rollout": 1, "checkpoint": 3, "other": 0})


def test_steps_add_up_by_their_seconds() -> None:
    long = step_times([span("accumulate", 0, 9)], (0, 9))
    short = step_times([span("rollout", 0, 1)], (0, 1))
    both = total_times([long, short])
    assert both.total_s == 10
    assert both.trainer_idle_ratio == pytest.approx(0.1)
    assert both.wait_shares == pytest.approx({"rollout": 0.1, "other": 0})
    assert both.metrics()["time/wait_ratio/rollout"] == pytest.approx(0.1)
    assert total_times([]) == StepTimes()
    assert StepTimes().trainer_idle_ratio == 0


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1])), max_size=6)


def moments(intervals: list[Interval]) -> set[int]:
    """Unit cells that integer intervals cover: the oracle."""
    return {cell for start, end in intervals for cell in range(int(start), int(end))}


@given(spans, spans)
def test_interval_arithmetic_is_set_arithmetic(first: list[Interval], second: list[Interval]) -> None:
    assert covered_s(first) == len(moments(first))
    for found, expected in (
        (merged(first), moments(first)),
        (intersection(first, second), moments(first) & moments(second)),
        (difference(first, second), moments(first) - moments(second)),
    ):
        assert moments(found) == expected
        assert all(start < end for start, end in found)
        assert covered_s(found) == sum(end - start for start, end in found) == len(expected)


@given(
    st.lists(st.tuples(st.sampled_from(["rollout", "score", "accumulate", "step", "sync", "new"]), spans), max_size=6)
)
def test_waits_add_up_to_the_bubble(work: list[tuple[str, list[Interval]]]) -> None:
    times = step_times([span(stage, *interval) for stage, intervals in work for interval in intervals], (0, 30))
    assert sum(times.wait_s.values()) == pytest.approx(times.trainer_idle_s)
    assert 0 <= times.trainer_idle_ratio <= 1
