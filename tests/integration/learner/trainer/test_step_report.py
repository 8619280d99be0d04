"""Step reports: skipped steps, records of samples and tokens, metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from learner.trainer.micro_batch import student_sequence
from learner.trainer.reports import StepReport
from learner.trainer.token_records import TokenRecord, choose_records, choose_samples
from tests.support.learner_oracle import relative_difference
from tests.support.learner_ranks import STAGES, Cut, Ranks, smooth_config, step, totals, weights_now
from tests.support.scored import learner_config, make_scored


def poison(item: ScoredTrajectory) -> ScoredTrajectory:
    values = item.score.logprobs.copy()
    values[0, 0] = np.nan
    return replace(item, score=replace(item.score, logprobs=values))


def guarded(rank: int, config: Config, bad: Cut, good: Cut) -> tuple[list[StepReport], list[float], float]:
    """A step with NaN, then a clean one: (reports, largest weight change of each, difference to a clean run)."""
    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    reports, changes = [], []
    for cut in (bad, good):
        before = weights_now(engine)
        engine.accumulate(cut[rank])
        reports.append(engine.finish_step(*totals([item for part in cut for item in part])))
        after = weights_now(engine)
        changes.append(max((after[name] - before[name]).abs().max().item() for name in before))
    clean = LearnerEngine(config)
    clean.accumulate(good[rank])
    clean.finish_step(*totals([item for part in good for item in part]))
    return reports, changes, relative_difference(weights_now(engine), weights_now(clean))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_nan_is_skipped_on_all_ranks(two: Ranks, tiny_model: Path, stage: int, dtype: str) -> None:
    """Only rank 1 holds the bad sample. No weight changes, the sample is named, and the next step is unaffected."""
    good = make_scored(4)
    bad = [*good[:3], poison(good[3])]
    config = learner_config(tiny_model, learner={"zero_stage": stage}, student={"dtype": dtype})
    results = two.call(guarded, config, [bad[:2], bad[2:]], [good[:2], good[2:]])
    for rank, (reports, changes, difference) in enumerate(results):
        assert [report.applied for report in reports] == [False, True]
        assert [report.skipped_in_a_row for report in reports] == [1, 0]
        assert [report.weight_version for report in reports] == [1, 2]
        assert reports[0].nonfinite == (() if rank == 0 else (good[3].trajectory.sample_id,))
        assert changes[0] == 0
        assert changes[1] > 0
        assert difference < 1e-6


def aged(rank: int, config: Config, scored: list[ScoredTrajectory]) -> list[dict[str, float]]:
    """Metrics of two steps on the same samples."""
    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    metrics = []
    for _ in range(2):
        engine.accumulate(scored[rank::2])
        metrics.append(engine.finish_step(*totals(scored)).metrics)
    return metrics


def test_the_teachers_age_counts_the_sequences_of_teachers_that_take_weights(two: Ranks, tiny_model: Path) -> None:
    named = ["followed", None, "followed", None, "followed"]
    versions = [0, -9, 0, -9, -3]
    scored = [
        replace(
            one,
            trajectory=replace(one.trajectory, prompt=replace(one.trajectory.prompt, teacher=name)),
            teacher_version=version,
        )
        for one, name, version in zip(make_scored(5), named, versions, strict=True)
    ]
    config = learner_config(tiny_model, teachers={"followed": {"kind": "live", "refresh_every": 2}})
    for metrics in two.call(aged, config, scored):
        assert [one["teacher/age"] for one in metrics] == [1.0, 2.0]
    frozen = learner_config(tiny_model, teachers={"followed": {}})
    assert "teacher/age" not in two.call(aged, frozen, scored)[0][0]


ADAM = {"weight_decay": 0.1, "lr": 1e-3, "eps": 1e-8, "betas": (0.9, 0.999)}


@pytest.mark.parametrize("stage", STAGES)
def test_the_update_norm_is_that_of_the_change(two: Ranks, tiny_model: Path, stage: int) -> None:
    """Under AdamW's usual settings: both moments and their corrections matter."""
    scored = make_scored(6)
    config = smooth_config(tiny_model, stage, learner=ADAM)
    for change, report, _ in two.call(step, config, [[scored[:3]], [scored[3:]]]):
        norm = float(sum(tensor.double().square().sum() for tensor in change.values())) ** 0.5
        assert report.metrics["update_norm"] == pytest.approx(norm, rel=1e-3)


def test_samples_that_cost_a_step_are_reported_as_json_values(one: Ranks, tiny_model: Path) -> None:
    scored = make_scored(3)
    bad = replace(scored[1], score=replace(scored[1].score, logprobs=np.full_like(scored[1].score.logprobs, np.nan)))
    ((_, report, _),) = one.call(step, smooth_config(tiny_model), [[[scored[0], bad, scored[2]]]])
    assert not report.applied
    assert report.metrics["update_norm"] == 0
    (record,) = report.skipped_records
    assert record["sample_id"] == bad.trajectory.sample_id
    assert record["response_ids"] == bad.trajectory.response_ids.tolist()
    assert record["teacher_topk_logprobs"][0][0] == "nan"
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize("deterministic", [False, True])
def test_token_records_hold_the_learners_log_probs(two: Ranks, tiny_model: Path, deterministic: bool) -> None:
    def record(rank: int, config: Config, cut: Cut) -> tuple[list[np.ndarray], tuple[TokenRecord, ...]]:
        from learner.trainer.engine import LearnerEngine

        engine = LearnerEngine(config)
        before = engine.inference.logprobs([student_sequence(one) for part in cut for one in part])
        for one in cut[rank]:  # a micro-batch each
            engine.accumulate([one])
        return before, engine.finish_step(*totals([one for part in cut for one in part])).token_records

    scored = make_scored(7)
    config = learner_config(
        tiny_model, run={"name": "test", "token_samples": 3}, learner={"deterministic": deterministic}
    )
    (before, first), (_, second) = two.call(record, config, [scored[:4], scored[4:]])
    kept = choose_records([*first, *second], 3)
    assert [one.sample_id for one in kept] == choose_samples([one.trajectory.sample_id for one in scored], 3)
    seen = {one.trajectory.sample_id: (one, logprobs) for one, logprobs in zip(scored, before, strict=True)}
    for record in kept:
        one, logprobs = seen[record.sample_id]
        assert record.values["student_logprobs"] == pytest.approx(logprobs, abs=2e-5)
        assert record.values["teacher_logprobs"] == pytest.approx(one.score.sampled_logprob, abs=2e-5)
        assert record.values["ids"] == one.trajectory.response_ids.tolist()


def test_a_lost_sample_is_detected(one: Ranks, tiny_model: Path) -> None:
    def miscount(rank: int, config: Config, scored: list[ScoredTrajectory]) -> None:
        from learner.trainer.engine import LearnerEngine

        engine = LearnerEngine(config)
        engine.accumulate(scored[1:])
        engine.finish_step(*totals(scored))

    with pytest.raises(ray.exceptions.RayTaskError, match="the ranks received"):
        one.call(miscount, learner_config(tiny_model), make_scored(3))


def test_a_step_without_samples_is_skipped(two: Ranks, tiny_model: Path) -> None:
    for stage in STAGES:
        config = learner_config(tiny_model, learner={"zero_stage": stage})
        for change, report, _ in two.call(step, config, [[[]], [[]]]):
            assert not report.applied
            assert max(tensor.abs().max().item() for tensor in change.values()) == 0


def uncounted(rank: int, config: Config, steps: list[Cut]) -> tuple[list[StepReport], dict[str, Tensor]]:
    """Run one engine through `steps`, one cut each."""
    from learner.trainer.engine import LearnerEngine

    engine, reports = LearnerEngine(config), []
    for cut in steps:
        engine.accumulate(cut[rank])
        reports.append(engine.finish_step(*totals([item for part in cut for item in part])))
    return reports, weights_now(engine)


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_counts_no_token_says_why(two: Ranks, tiny_model: Path, stage: int, normalize: str) -> None:
    """All responses are shorter than `skip_first_tokens`. No weight changes, and the next step is unaffected."""
    short, long = make_scored(4, response_tokens=(2, 6)), make_scored(4, seed=1, response_tokens=(9, 12))
    poor, good = [short[:3], short[3:]], [long[:2], long[2:]]
    config = smooth_config(tiny_model, stage, loss={"skip_first_tokens": 6, "normalize": normalize})
    longest = max(len(item.trajectory.response_ids) for item in short)
    results = two.call(uncounted, config, [good, poor, poor, [[], []], good])
    clean = two.call(uncounted, config, [good, good])
    for (reports, weights), (_, expected) in zip(results, clean, strict=True):
        assert [report.applied for report in reports] == [True, False, False, False, True]
        assert [report.skipped_in_a_row for report in reports] == [0] * 5
        assert [report.uncounted_in_a_row for report in reports] == [0, 1, 2, 3, 0]
        why = f"no token was counted: loss.skip_first_tokens is 6, the longest answer has {longest}"
        assert [report.uncounted for report in reports[:3]] == ["", why, why]
        assert "0 answers" in reports[3].uncounted
        assert reports[1].metrics["grad_norm"] == 0
        assert relative_difference(weights, expected) < 1e-6


def test_metrics_are_global_means(two: Ranks, one: Ranks, tiny_model: Path) -> None:
    scored = make_scored(6)
    config = learner_config(tiny_model)
    ((_, alone, _),) = one.call(step, config, [[scored]])
    for _, report, _ in two.call(step, config, [[scored[:1]], [scored[1:]]]):
        assert report.metrics == pytest.approx(alone.metrics, rel=1e-4)
    metrics = alone.metrics
    assert metrics["kl/lower_bound"] == pytest.approx(metrics["kl/support"] + metrics["kl/tail"], rel=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["kl/lower_bound"], rel=1e-6)  # `tail`, reverse
    assert 0 < metrics["mass/student_topk"] < 1
    teacher = np.concatenate([np.exp(item.score.logprobs.astype(np.float64)).sum(-1) for item in scored])
    assert metrics["mass/teacher_topk"] == pytest.approx(teacher.mean(), rel=1e-4)
