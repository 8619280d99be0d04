"""Engine against learner on trained tokens: what is measured, and what a step's figure leads to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.model import LossConfig, SyncConfig
from learner.loop.mismatch import MismatchBounds, MismatchError, MismatchGate, mismatch_bounds
from learner.trainer.micro_batch import build_micro_batch
from learner.trainer.objective import Objective
from learner.trainer.output_layer import ChunkView
from tests.support.scored import make_scored


def test_the_objective_counts_tokens_whose_probability_is_off_by_a_tenth() -> None:
    (scored,) = make_scored(1, k=4, response_tokens=(9, 10))
    ratios = np.array([1.0, 0.905, 1.099, 1.101, 0.901, 0.899, 2.0, math.nan, 0.5])
    learner = np.full(9, -2.0)
    engine = (learner - np.log(ratios)).astype(np.float32)
    mask = np.array([True] * 8 + [False])
    trajectory = replace(scored.trajectory, sampled_logprobs=engine, loss_mask=mask)
    objective = Objective(build_micro_batch([replace(scored, trajectory=trajectory)], LossConfig()), LossConfig())
    support = torch.full((9, 4), -3.0)
    objective(ChunkView(slice(0, 9), support, torch.full((9,), -1.0), torch.tensor(learner, dtype=torch.float32)))
    sums = objective.metric_sums()
    assert sums["mismatch/outside"] == 4  # 1.101, 0.899, 2.0 and what is no number; the masked one is not looked at
    assert math.isnan(sums["mismatch/squared"])


def gate(**bounds: float | None) -> MismatchGate:
    none = dict.fromkeys(("warn_nats", "stop_nats", "warn_share", "stop_share"))
    return MismatchGate(MismatchBounds(**{**none, **bounds}))


def metrics(rms: float, outside: float = 0.0, **others: float) -> dict[str, float]:
    return {"mismatch/rms": rms, "mismatch/outside": outside, **others}


@pytest.mark.parametrize(
    ("bounds", "values"),
    [
        ({"warn_nats": 0.01}, metrics(0.0101)),
        ({"warn_share": 0.1}, metrics(0.0, 0.11)),
        ({"warn_nats": 0.01, "stop_nats": 0.02, "stop_share": 0.5}, metrics(0.02, 0.5)),
    ],
)
def test_a_step_past_a_warning_bound_is_reported(bounds: dict[str, float], values: dict[str, float]) -> None:
    drift = gate(**bounds)
    assert drift.check(3, metrics(0.01, 0.1)) is None
    line = drift.check(4, values)
    assert line is not None
    assert line.startswith("step 4: ")
    assert drift.warned == 1


@pytest.mark.parametrize(
    ("bounds", "values"),
    [({"stop_nats": 0.02}, metrics(0.021)), ({"stop_share": 0.5}, metrics(0.0, 0.51)), ({}, metrics(math.nan, 1.0))],
)
def test_a_step_past_a_stop_bound_ends_the_run(bounds: dict[str, float], values: dict[str, float]) -> None:
    with pytest.raises(MismatchError, match=r"step 7: .*sync\.mismatch_stop_nats"):
        gate(**bounds).check(7, values)


def test_a_step_that_the_learner_skipped_is_its_own_affair() -> None:
    drift = gate(stop_nats=0.02, stop_share=0.5)
    assert drift.check(1, metrics(math.nan, 1.0, skipped=1.0)) is None
    with pytest.raises(MismatchError):
        drift.check(1, metrics(0.5, skipped=1.0))


def test_log_probs_that_cannot_be_compared_are_not() -> None:
    assert gate(warn_nats=1e-9, stop_nats=1e-9).check(1, {"loss": 1.0}) is None


def test_default_bounds_go_by_the_type_and_hold_for_strict_runs_alone() -> None:
    sync = SyncConfig()
    strict = mismatch_bounds(sync, dtype="float32", max_staleness=0)
    assert strict == MismatchBounds(0.002, pytest.approx(0.01), 0.1, 0.5)
    assert mismatch_bounds(sync, dtype="bfloat16", max_staleness=0) == MismatchBounds(0.1, 0.5, 0.2, 0.5)
    assert mismatch_bounds(sync, dtype="bfloat16", max_staleness=1) == MismatchBounds(None, None, None, None)
    own = SyncConfig(mismatch_warn_nats=0.3, mismatch_stop_share=0.9)
    assert mismatch_bounds(own, dtype="float32", max_staleness=2) == MismatchBounds(0.3, None, None, 0.9)
    assert mismatch_bounds(own, dtype="float32", max_staleness=0) == MismatchBounds(0.3, pytest.approx(1.5), 0.1, 0.9)
