"""The simulator against steps calculated by hand; more or faster machines never slow a run."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deploy.simulator.config import SimulationConfig, Spread
from deploy.simulator.result import QueueDepth, Simulation, queue_depth
from deploy.simulator.simulate import simulate


def run(steps: int = 1, samples: int = 1, **sections: Any) -> Simulation:
    return simulate(SimulationConfig.model_validate({"steps": steps, "samples_per_step": samples, **sections}))


def seconds(simulation: Simulation) -> list[float]:
    """Seconds of each step."""
    return [step.total_s for step in simulation.steps]


def stages(rollout_s: float, teacher_s: float, learner_s: float, *, slots: int = 1) -> dict[str, Any]:
    """One worker, replica and rank with these seconds for each answer, one answer in a micro-batch."""
    return {
        "prompt_tokens": 0,
        "rollout": {"answer_tokens": {"mean": 10}, "token_s": {"mean": rollout_s / 10}, "concurrency": slots},
        "teacher": {"tokens_per_s": 10 / teacher_s},
        "learner": {"tokens_per_s": 10 / learner_s, "micro_batch_tokens": 10},
    }


# --- calculated by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("follows", "second"), [(False, 8.0), (True, 10.0)])
def test_one_answer_takes_the_sum_of_its_stages(follows: bool, second: float) -> None:
    simulation = run(
        steps=2,
        prompt_tokens=5,
        rollout={"answer_tokens": {"mean": 10}, "token_s": {"mean": 0.1}, "answer_s": 0.5},
        teacher={"tokens_per_s": 10, "context_tokens": 20, "request_s": 0.25, "context_every_version": follows},
        learner={"tokens_per_s": 5, "step_s": 0.5},
        sync={"seconds": 1, "parity_s": 0.25},
    )
    # rollout 1.5, score 2 (context) + 1.5 + 0.25, accumulate 3, step 0.5, sync 1, parity 0.25
    assert seconds(simulation) == pytest.approx([10.0, second])
    first = simulation.steps[0]
    assert first.stage_s == pytest.approx(
        {"rollout": 1.5, "score": 3.75, "accumulate": 3, "step": 0.5, "sync": 1, "parity": 0.25}
    )
    assert first.wait_s == pytest.approx({"rollout": 1.5, "score": 3.75, "sync": 1, "parity": 0.25, "other": 0})
    assert first.trainer_idle_ratio == pytest.approx(0.65)
    assert simulation.tokens_per_s == pytest.approx(20 / (10 + second))


@pytest.mark.parametrize("times", [(0.4, 0.1, 0.2), (0.1, 0.4, 0.2), (0.1, 0.2, 0.4)])
def test_a_pipeline_takes_its_slowest_stage_and_one_answer_of_the_others(times: tuple[float, float, float]) -> None:
    simulation = run(samples=50, **stages(*times))
    assert simulation.step_s == pytest.approx(50 * max(times) + sum(times) - max(times))
    assert simulation.slowest_stage_s == pytest.approx(50 * max(times))


def test_answers_that_end_evenly_are_scored_and_trained_as_they_come() -> None:
    """32 answers over 1.0 s of rollout, 0.8 s of scoring and 0.9 s of training: serial would be 2.7 s."""
    sections = stages(0.5, 0.8 / 32, 0.9 / 32, slots=32)
    sections["rollout"]["token_s"] = {"kind": "uniform", "mean": 0.05, "spread": 1}
    simulation = run(samples=32, steps=5, **sections)
    assert simulation.total.stage_s["rollout"] / 5 == pytest.approx(1.0, abs=0.1)
    assert simulation.step_s <= 1.25 * simulation.slowest_stage_s
    assert simulation.total.overlap_ratio > 2


def test_answers_in_flight_slow_each_other_down() -> None:
    sections = stages(1.0, 1e-9, 1e-9, slots=2)
    sections["rollout"]["contention"] = 0.5
    # Two at a time at 1/1.5 of their speed, then the third alone.
    assert run(samples=3, **sections).step_s == pytest.approx(2.5)
    assert run(samples=4, **sections).step_s == pytest.approx(3.0)


@pytest.mark.parametrize(("interference", "expected"), [(0.0, 3.0), (0.5, 3.5), (1.0, 4.0)])
def test_stages_that_share_cores_slow_each_other_down(interference: float, expected: float) -> None:
    """Only the second rollout and the first training overlap."""
    simulation = run(samples=2, interference=interference, **stages(1.0, 1e-9, 1.0))
    assert simulation.step_s == pytest.approx(expected)
    rollouts = sorted((span.start, span.end) for span in simulation.spans if span.stage == "rollout")
    assert rollouts == [pytest.approx((0, 1)), pytest.approx((1, expected - 1))]


def test_three_stages_on_the_same_cores_get_a_third_each() -> None:
    simulation = run(samples=3, interference=1.0, **stages(1.0, 1.0, 1.0))
    # One alone, two at a time, three at a time, two, one: work of nine seconds, never more than the machine can.
    assert simulation.step_s == pytest.approx(9)


def test_the_rest_of_an_answer_is_faster_alone() -> None:
    sections = stages(1.0, 1e-9, 1e-9, slots=2)
    sections["rollout"] |= {"contention": 1.0, "token_s": {"kind": "uniform", "mean": 0.1, "spread": 1}}
    simulation = run(samples=2, **sections)
    ends = sorted(span.end for span in simulation.spans if span.stage == "rollout")
    short, long = sorted(_alone_s(sections, 2))
    assert ends == pytest.approx([2 * short, 2 * short + (long - short)])


def test_a_joining_answer_keeps_the_progress_of_the_others() -> None:
    sections = stages(1.0, 1e-9, 1e-9, slots=3)
    sections["rollout"] |= {"contention": 1.0, "token_s": {"kind": "exponential", "mean": 0.1}}
    *three, joining = _alone_s(sections, 4)
    first, second, _ = sorted(three)
    gap = second - first
    assert joining > gap  # the seed's answers fit the story
    sections["sync"] = {"seconds": 1, "parity_s": gap}
    ends = [s.end for s in run(steps=2, max_staleness=2, **sections).spans if s.stage == "rollout"]
    # Three at a third of their speed up to `first`; a sync; two at half speed for `gap`; then the fourth is issued, and
    # half of the gap is left to the second at a third of its speed.
    assert ends == pytest.approx([3 * first, 3 * first + 1 + gap + 3 * gap / 2])


def _alone_s(sections: dict[str, Any], count: int) -> list[float]:
    """Seconds of each answer on an idle worker, from runs with one slot."""
    one = {**sections, "rollout": {**sections["rollout"], "concurrency": 1}}
    spans = [span for span in run(samples=count, **one).spans if span.stage == "rollout"]
    return [span.end - span.start for span in spans]


def test_rollouts_that_run_ahead_hide_behind_training() -> None:
    sections = stages(4.0, 1e-9, 0.5, slots=4)
    assert seconds(run(steps=4, samples=2, **sections)) == pytest.approx([5, 5, 5, 5])
    # Four answers at once, ready at 4: steps 0 and 1 train on them. Two more are issued at 5 and two at 6.
    ahead = run(steps=4, samples=2, max_staleness=1, **sections)
    assert seconds(ahead) == pytest.approx([5, 1, 4, 1])
    assert ahead.evicted == 0


def test_answers_in_flight_pause_during_a_sync() -> None:
    sections = {**stages(2.0, 1e-9, 1.0), "sync": {"seconds": 2}}
    simulation = run(steps=3, samples=1, max_staleness=1, **sections)
    # 0-2 answer 0; trained 2-3; sync 3-5 stops answer 1 (begun at 2), which ends at 6; answer 2 is issued at 5, begins
    # at 6, stands still 7-9, ends at 10.
    assert seconds(simulation) == pytest.approx([5, 4, 4])


def test_more_replicas_and_ranks_share_the_work() -> None:
    sections = stages(1e-9, 0.4, 1e-9)
    sections["teacher"]["replicas"] = 4
    assert run(samples=8, **sections).step_s == pytest.approx(0.8)
    sections = stages(1e-9, 1e-9, 0.4)
    sections["learner"]["ranks"] = 4
    assert run(samples=8, **sections).step_s == pytest.approx(0.8)


def test_a_teacher_scores_what_waits_together_up_to_its_batch() -> None:
    sections = stages(1.0, 1.0, 1e-9, slots=4)
    sections["teacher"] |= {"batch_tokens": 30, "window_s": 0.25, "request_s": 0.5}
    # Four answers at 1.0; three from 1.25 on, done at 4.25, the last one at 5.25; half a second later the loop knows.
    simulation = run(samples=4, **sections)
    ends = sorted(span.end for span in simulation.spans if span.stage == "score")
    assert ends == pytest.approx([4.75, 4.75, 4.75, 5.75])
    assert simulation.busy["teacher"] == pytest.approx(4 / 5.75, rel=1e-6)


def test_micro_batches_and_the_loop_have_costs_of_their_own() -> None:
    sections = stages(1e-9, 1e-9, 1.0)
    sections["learner"]["micro_batch_s"] = 0.5
    simulation = run(samples=4, steps=2, loop_s=0.25, **sections)
    assert seconds(simulation) == pytest.approx([6.25, 6.25])
    assert simulation.total.wait_s["other"] == pytest.approx(0.5)


def test_a_micro_batch_costs_its_padding() -> None:
    sections = stages(1.0, 1e-9, 0.1, slots=2)
    sections["rollout"] |= {"answer_tokens": {"kind": "uniform", "mean": 50, "spread": 0.9}, "token_s": {"mean": 1e-9}}
    sections["learner"] = {"tokens_per_s": 1, "micro_batch_tokens": 1000}
    simulation = run(samples=2, **sections)
    tokens = sorted(round(s.end - s.start) for s in run(samples=2, **_one_by_one(sections)).spans if _trains(s.stage))
    assert simulation.step_s == pytest.approx(2 * tokens[1])


def _one_by_one(sections: dict[str, Any]) -> dict[str, Any]:
    return {**sections, "learner": {"tokens_per_s": 1, "micro_batch_tokens": 1}}


def _trains(stage: str) -> bool:
    return stage == "accumulate"


def test_queues_are_measured() -> None:
    # Two slots for four answers of 1 s; the teacher takes 3 s for each: answers arrive 2 at 1, 2 at 2.
    simulation = run(samples=4, **stages(1.0, 3.0, 1e-9, slots=2))
    assert simulation.step_s == pytest.approx(13)
    assert simulation.queues["rollout"] == QueueDepth(mean=pytest.approx(2 / 13), max=2)
    # Waits of 0, 3, 5 and 8 seconds; from 2 to 4 three wait.
    assert simulation.queues["teacher"] == QueueDepth(mean=pytest.approx(16 / 13), max=3)
    assert simulation.queues["learner"] == QueueDepth(0.0, 0)
    assert simulation.busy["rollout"] == pytest.approx(4 / 26)
    assert simulation.busy["teacher"] == pytest.approx(12 / 13)


def test_depth_of_a_queue() -> None:
    assert queue_depth([(0, 2), (1, 3), (3, 4), (9, 20)], 10) == QueueDepth(mean=pytest.approx(0.6), max=2)
    assert queue_depth([], 10) == QueueDepth(0.0, 0)


# --- properties -------------------------------------------------------------------------------------------------------

latencies = st.sampled_from(
    [
        {"mean": 0.05},
        {"kind": "uniform", "mean": 0.05, "spread": 1},
        {"kind": "exponential", "mean": 0.05},
        {"kind": "lognormal", "mean": 0.05, "spread": 1.5},
    ]
)
configs = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 4),
        "samples_per_step": st.integers(1, 20),
        "max_staleness": st.integers(0, 2),
        "seed": st.integers(0, 99),
        "rollout": st.fixed_dictionaries(
            {
                "workers": st.integers(1, 4),
                "concurrency": st.integers(1, 6),
                "answer_tokens": st.sampled_from([{"mean": 40}, {"kind": "uniform", "mean": 40, "spread": 0.9}]),
                "token_s": latencies,
                "contention": st.sampled_from([0.0, 0.2]),
                "answer_s": st.sampled_from([0.0, 0.3]),
            }
        ),
        "teacher": st.fixed_dictionaries(
            {
                "replicas": st.integers(1, 3),
                "tokens_per_s": st.sampled_from([50.0, 500.0]),
                "context_tokens": st.sampled_from([0, 500]),
                "request_s": st.sampled_from([0.0, 0.1]),
            }
        ),
        "learner": st.fixed_dictionaries(
            {
                "ranks": st.integers(1, 3),
                "tokens_per_s": st.sampled_from([100.0, 1000.0]),
                "micro_batch_tokens": st.sampled_from([100, 400]),
                "step_s": st.sampled_from([0.0, 0.5]),
            }
        ),
        "sync": st.fixed_dictionaries(
            {"seconds": st.sampled_from([0.0, 1.0]), "parity_s": st.sampled_from([0.0, 0.2])}
        ),
    }
)


@settings(max_examples=60)
@given(configs)
def test_every_run_trains_each_answer_once_and_keeps_its_bounds(config: dict[str, Any]) -> None:
    simulation = run(**config)
    assert len(simulation.steps) == config["steps"]
    trained = Counter(str(span.args["sample"]) for span in simulation.spans if span.stage == "rollout")
    assert set(trained.values()) == {1}
    assert len(trained) == config["steps"] * config["samples_per_step"]
    assert simulation.evicted == 0 or config["max_staleness"] > 0
    for step in simulation.steps:
        assert sum(step.wait_s.values()) == pytest.approx(step.trainer_idle_s)
        assert step.wait_s["other"] == pytest.approx(0, abs=1e-9)  # a stage is always at work
    total = simulation.total.total_s
    assert total >= simulation.slowest_stage_s * config["steps"] - 1e-9
    assert all(0 <= share <= 1 + 1e-9 for share in simulation.busy.values())
    assert run(**config) == simulation


@settings(max_examples=40)
@given(configs, st.sampled_from([0.5, 4.0]))
def test_time_scales_with_every_speed(config: dict[str, Any], factor: float) -> None:
    slow = {
        **config,
        "rollout": {
            **config["rollout"],
            "token_s": {**config["rollout"]["token_s"], "mean": config["rollout"]["token_s"]["mean"] * factor},
            "answer_s": config["rollout"]["answer_s"] * factor,
        },
        "teacher": {
            **config["teacher"],
            "tokens_per_s": config["teacher"]["tokens_per_s"] / factor,
            "request_s": config["teacher"]["request_s"] * factor,
        },
        "learner": {
            **config["learner"],
            "tokens_per_s": config["learner"]["tokens_per_s"] / factor,
            "step_s": config["learner"]["step_s"] * factor,
        },
        "sync": {name: value * factor for name, value in config["sync"].items()},
    }
    assert seconds(run(**slow)) == pytest.approx([factor * value for value in seconds(run(**config))])


def equal_answers(config: dict[str, Any]) -> dict[str, Any]:
    """Answers of one length, no contention: queues then serve equal work, and more of anything cannot delay."""
    rollout = {**config["rollout"], "answer_tokens": {"mean": 40}, "contention": 0.0}
    return {**config, "max_staleness": 0, "rollout": rollout}


@settings(max_examples=60)
@given(
    configs.map(equal_answers),
    st.sampled_from(
        [
            ("rollout", "workers", lambda n: n + 1),
            ("rollout", "concurrency", lambda n: n + 1),
            ("rollout", "answer_s", lambda s: s / 2),
            ("teacher", "replicas", lambda n: n + 1),
            ("teacher", "tokens_per_s", lambda rate: 2 * rate),
            ("teacher", "context_tokens", lambda n: n // 2),
            ("learner", "tokens_per_s", lambda rate: 2 * rate),
            ("learner", "step_s", lambda s: s / 2),
            ("sync", "seconds", lambda s: s / 2),
        ]
    ),
)
def test_more_and_faster_machines_are_never_slower(config: dict[str, Any], change: tuple[str, str, Any]) -> None:
    section, key, better = change
    if key == "replicas":  # an unused replica would still compute the context
        config = {**config, "teacher": {**config["teacher"], "context_tokens": 0}}
    improved = {**config, section: {**config[section], key: better(config[section][key])}}
    for before, after in zip(seconds(run(**config)), seconds(run(**improved)), strict=True):
        assert after <= before + 1e-9


@settings(max_examples=40)
@given(configs.map(equal_answers))
def test_running_ahead_is_never_slower_where_nothing_is_evicted(config: dict[str, Any]) -> None:
    totals = []
    for max_staleness in range(3):
        ahead = run(**{**config, "max_staleness": max_staleness})
        if ahead.evicted:
            return
        totals.append(ahead.total.total_s)
    assert all(after <= before + 1e-9 for before, after in pairwise(totals))


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_a_large_cluster_is_simulated_in_seconds() -> None:
    started = time.process_time()
    simulation = run(
        steps=10,
        samples=128,
        rollout={"workers": 64, "concurrency": 8, "answer_tokens": {"kind": "lognormal", "mean": 2000, "spread": 1}},
        teacher={"replicas": 4, "context_tokens": 8000},
        learner={"ranks": 8, "step_s": 1},
        sync={"seconds": 2},
        max_staleness=1,
    )
    assert time.process_time() - started < 5
    assert len(simulation.steps) == 10


@pytest.mark.parametrize(
    "spread",
    [
        Spread(mean=3),
        Spread(kind="uniform", mean=3, spread=0.5),
        Spread(kind="exponential", mean=3),
        Spread(kind="lognormal", mean=3, spread=0.7),
    ],
)
def test_draws_have_the_configured_mean_and_spread(spread: Spread) -> None:
    rng = np.random.default_rng(0)
    values = np.array([spread.draw(rng) for _ in range(20_000)])
    deviation = {"constant": 0, "uniform": 0.5 / np.sqrt(3), "exponential": 1, "lognormal": 0.7}[spread.kind]
    assert values.mean() == pytest.approx(3, rel=0.03)
    assert values.std() / 3 == pytest.approx(deviation, abs=0.04)
    assert values.min() > 0


def test_an_observed_distribution_is_reproduced() -> None:
    rng = np.random.default_rng(0)
    spread = Spread(kind="observed", mean=4, shape=(0.5, 0.5, 2.0))
    values = Counter(spread.draw(rng) for _ in range(3000))
    assert set(values) == {2.0, 8.0}
    assert values[8.0] == pytest.approx(1000, rel=0.1)


@pytest.mark.parametrize(
    "spread",
    [
        {"kind": "observed", "mean": 1},
        {"mean": 1, "shape": [1.0]},
        {"mean": 1, "spread": 0.5},
        {"kind": "uniform", "mean": 1, "spread": 1.5},
        {"mean": 0},
    ],
)
def test_an_invalid_spread_is_refused(spread: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Spread.model_validate(spread)
