"""Importance weights against expectations computed by enumerating every response."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.loader import validate
from common.config.model import Config, ConfigError, LossConfig, RolloutConfig
from learner.trainer.importance import PrefixRatios
from learner.trainer.micro_batch import build_micro_batch
from learner.trainer.objective import Objective
from learner.trainer.output_layer import ChunkView
from learner.trainer.step_metrics import METRICS, step_means
from tests.support.scored import make_scored

VOCABULARY, LENGTH = 3, 3


def prefix_ratios(
    learner: Tensor, engine: Tensor, sample_index: Tensor, clip: float, is_student: Tensor | None = None
) -> Tensor:
    """All rows as one chunk."""
    is_student = torch.ones(len(learner), dtype=torch.bool) if is_student is None else is_student
    return PrefixRatios(clip)(learner, engine, sample_index, is_student)


def policy(seed: int) -> dict[tuple[int, ...], Tensor]:
    """Next-token distributions after every prefix, ``[V]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).softmax(0)
        for length in range(LENGTH)
        for prefix in itertools.product(range(VOCABULARY), repeat=length)
    }


def test_prefix_ratios_turn_the_old_policys_mean_divergence_into_the_new_ones() -> None:
    new, old, teacher = policy(0), policy(1), policy(2)
    responses = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    rows = [(response[:t], response[t]) for response in responses for t in range(LENGTH)]
    log_new = torch.stack([new[prefix][token].log() for prefix, token in rows])
    log_old = torch.stack([old[prefix][token].log() for prefix, token in rows])
    divergence = torch.stack([(new[p] * (new[p] / teacher[p]).log()).sum() for p, _ in rows]).view(-1, LENGTH)
    sample_index = torch.arange(len(responses)).repeat_interleave(LENGTH)
    chance_new = log_new.view(-1, LENGTH).sum(1).exp()
    chance_old = log_old.view(-1, LENGTH).sum(1).exp()
    target = (chance_new @ divergence).sum()
    naive = (chance_old @ divergence).sum()
    prefixes = prefix_ratios(log_new, log_old, sample_index, math.inf).view(-1, LENGTH).double()
    tokens = (log_new - log_old).exp().view(-1, LENGTH)
    assert abs(naive - target) > 0.01
    assert (chance_old @ (prefixes * divergence)).sum() == pytest.approx(float(target), abs=1e-6)
    # The ratio of the token itself does not change the mean: it would be noise, no correction.
    assert (chance_old @ (tokens * divergence)).sum() == pytest.approx(float(naive), abs=1e-6)


def test_prefix_ratios_restart_with_each_sample_and_are_clipped() -> None:
    difference = torch.tensor([0.5, -0.25, 1.0, -1.0, 2.0])
    weights = prefix_ratios(difference, torch.zeros(5), torch.tensor([4, 4, 4, 7, 7]), 1.5)
    assert weights.tolist() == pytest.approx([1.0, 1.5, math.exp(0.25), 1.0, math.exp(-1.0)])
    empty = torch.zeros(0)
    assert prefix_ratios(empty, empty, empty.long(), 1.0).shape == (0,)


def test_prefix_ratios_do_not_overflow_and_have_no_gradient() -> None:
    learner = torch.tensor([0.0, -2000.0, -2000.0, 0.0], requires_grad=True)
    engine = torch.tensor([-2000.0, 0.0, 0.0, 0.0])
    weights = prefix_ratios(learner, engine, torch.zeros(4, dtype=torch.long), 2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 1.0, 0.0])
    assert not weights.requires_grad


def test_a_clip_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio_clip"):
        PrefixRatios(0.0)


@pytest.mark.parametrize("size", range(1, 13))
def test_chunks_carry_the_prefix_over_to_the_rest_of_a_sample(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    sample_index, is_student = torch.tensor([0] * 5 + [1] + [2] * 6), torch.ones(12, dtype=torch.bool)
    ratios = PrefixRatios(3.0)
    chunks = [slice(start, start + size) for start in range(0, 12, size)]
    weights = torch.cat([ratios(new[rows], old[rows], sample_index[rows], is_student[rows]) for rows in chunks])
    torch.testing.assert_close(weights, prefix_ratios(new, old, sample_index, 3.0))
    assert (weights == 3.0).any()  # the carried sum is the untruncated one


def test_tokens_of_an_environment_have_ratio_one() -> None:
    difference = torch.tensor([0.5, 9.0, -9.0, 0.25, 1.0])
    is_student = torch.tensor([True, False, False, True, True])
    weights = prefix_ratios(difference, torch.zeros(5), torch.zeros(5, dtype=torch.long), 100.0, is_student)
    assert weights.log().tolist() == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.75])


def ess_ratio(weights: list[float]) -> float:
    """The reported effective sample size over the number of tokens."""
    sums = dict.fromkeys(METRICS, 0.0)
    sums["importance/mean"], sums["importance/squared"] = sum(weights), sum(weight**2 for weight in weights)
    return step_means(sums, len(weights), LossConfig(importance_clip=2.0), RolloutConfig())["importance/ess_ratio"]


def test_the_ess_ratio_falls_as_weights_spread() -> None:
    assert ess_ratio([0.3] * 7) == pytest.approx(1.0)
    assert ess_ratio([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert ess_ratio([0.0, 0.0]) == 0.0


@pytest.mark.parametrize("size", [3, 1000])
def test_the_objective_weights_each_tokens_divergence_and_reports_the_weights(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scored = make_scored(4, k=4, response_tokens=(5, 12))
    first = scored[0].trajectory
    mask = np.arange(len(first.response_ids)) % 3 != 1
    scored[0] = replace(scored[0], trajectory=replace(first, loss_mask=mask))
    plain, config = LossConfig(top_k=4), LossConfig(top_k=4, importance_clip=1.5)
    batch = build_micro_batch(scored, config)
    tokens = len(batch.sample_index)
    logits = torch.randn(tokens, 6, generator=generator).requires_grad_()
    sampled = batch.engine_sampled + 0.3 * torch.randn(tokens, generator=generator)

    def value(objective: Objective, rows: slice) -> Tensor:
        logprobs = logits[rows].log_softmax(-1)
        return objective(ChunkView(rows, logprobs[:, :4], logprobs[:, 4:].logsumexp(-1), sampled[rows]))

    weighted = Objective(batch, config)
    total = torch.stack([value(weighted, slice(i, min(i + size, tokens))) for i in range(0, tokens, size)]).sum()
    difference = torch.where(batch.is_student, sampled - batch.engine_sampled, 0.0)
    expected_weights = prefix_ratios(difference, torch.zeros(tokens), batch.sample_index, 1.5)
    alone = torch.stack([value(Objective(batch, plain), slice(i, i + 1)) for i in range(tokens)])
    expected = (expected_weights * alone).sum()
    torch.testing.assert_close(total, expected)
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    counted = expected_weights[batch.weights > 0]
    means = step_means(weighted.metric_sums(), len(counted), config, RolloutConfig())
    assert means["importance/mean"] == pytest.approx(float(counted.mean()))
    assert means["importance/ess_ratio"] == pytest.approx(ess_ratio(counted.tolist()))
    assert means["importance/ess_ratio"] < 0.99


def test_weights_are_refused_if_the_two_log_probs_cannot_be_compared() -> None:
    base = {"run": {"name": "r"}, "student": {"model": "m"}, "context": {"text": "c"}, "data": {"train": "t"}}
    assert validate(Config, {**base, "loss": {"importance_clip": 2.0}}).loss.importance_clip == 2.0
    for rollout, loss in (
        ({"temperature": 0.7}, {}),
        ({"top_p": 0.9}, {}),
        ({}, {"form": "policy_gradient"}),
    ):
        with pytest.raises(ConfigError, match=r"loss\.importance_clip"):
            validate(Config, {**base, "rollout": rollout, "loss": {"importance_clip": 2.0, **loss}})


def test_the_policy_gradient_is_refused_if_the_two_log_probs_cannot_be_compared() -> None:
    base = {"run": {"name": "r"}, "student": {"model": "m"}, "context": {"text": "c"}, "data": {"train": "t"}}
    form = {"form": "policy_gradient"}
    assert validate(Config, {**base, "loss": form}).loss.form == "policy_gradient"
    for rollout in ({"temperature": 0.7}, {"top_p": 0.9}):
        with pytest.raises(ConfigError, match=r"policy_gradient.*rollout\.top_p \(.*\) must be 1"):
            validate(Config, {**base, "rollout": rollout, "loss": form})
        validate(Config, {**base, "rollout": rollout})
