"""Importance weights against expectations that are computed by enumerating every answer."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.loader import validate
from common.config.model import Config, ConfigError, LossConfig
from learner.trainer.batching import training_batch
from learner.trainer.importance import PrefixRatios, effective_share, prefix_ratios, token_ratios
from learner.trainer.objective import Objective
from learner.trainer.output_layer import ChunkView
from tests.support.scored import make_scored

VOCABULARY, LENGTH = 3, 3


def policy(seed: int) -> dict[tuple[int, ...], torch.Tensor]:
    """Next-token distributions after every prefix, ``[V]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: torch.randn(VOCABULARY, generator=generator, dtype=torch.float64).softmax(0)
        for length in range(LENGTH)
        for prefix in itertools.product(range(VOCABULARY), repeat=length)
    }


def test_prefix_ratios_make_the_old_policys_mean_divergence_the_new_ones() -> None:
    new, old, teacher = policy(0), policy(1), policy(2)
    answers = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
    rows = [(answer[:t], answer[t]) for answer in answers for t in range(LENGTH)]
    log_new = torch.stack([new[prefix][token].log() for prefix, token in rows])
    log_old = torch.stack([old[prefix][token].log() for prefix, token in rows])
    divergence = torch.stack([(new[p] * (new[p] / teacher[p]).log()).sum() for p, _ in rows]).view(-1, LENGTH)
    owners = torch.arange(len(answers)).repeat_interleave(LENGTH)
    chance_new = log_new.view(-1, LENGTH).sum(1).exp()
    chance_old = log_old.view(-1, LENGTH).sum(1).exp()
    target = (chance_new @ divergence).sum()
    naive = (chance_old @ divergence).sum()
    prefixes = prefix_ratios(log_new, log_old, owners, math.inf).view(-1, LENGTH).double()
    tokens = token_ratios(log_new, log_old, math.inf).view(-1, LENGTH).double()
    assert abs(naive - target) > 0.01
    assert (chance_old @ (prefixes * divergence)).sum() == pytest.approx(float(target), abs=1e-6)
    # The token's own ratio leaves the mean where it was: it would be noise, no correction.
    assert (chance_old @ (tokens * divergence)).sum() == pytest.approx(float(naive), abs=1e-6)


def test_token_ratios_are_cut_from_above_and_never_overflow() -> None:
    learner = torch.tensor([-1.0, -1.0, 0.0, -2000.0], requires_grad=True)
    behaviour = torch.tensor([-1.0, -2.0, -2000.0, 0.0])
    weights = token_ratios(learner, behaviour, 2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 2.0, 0.0])
    assert token_ratios(learner, behaviour, 10.0)[1] == pytest.approx(math.e)
    assert not weights.requires_grad


def test_prefix_ratios_start_anew_with_each_answer() -> None:
    difference = torch.tensor([0.5, -0.25, 1.0, -1.0, 2.0])
    weights = prefix_ratios(difference, torch.zeros(5), torch.tensor([4, 4, 4, 7, 7]), 1.5)
    assert weights.tolist() == pytest.approx([1.0, 1.5, math.exp(0.25), 1.0, math.exp(-1.0)])
    assert prefix_ratios(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long), 1.0).shape == (0,)


def test_the_effective_share_falls_as_weights_spread() -> None:
    assert effective_share(torch.full((7,), 0.3)) == pytest.approx(1.0)
    assert effective_share(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective_share(torch.zeros(2)) == 0.0


def test_a_clip_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio_clip"):
        token_ratios(torch.zeros(1), torch.zeros(1), 0.0)


@pytest.mark.parametrize("size", range(1, 13))
def test_chunks_carry_the_prefix_over_to_the_rest_of_an_answer(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    owners = torch.tensor([0] * 5 + [1] + [2] * 6)
    ratios = PrefixRatios(3.0)
    chunks = [slice(start, start + size) for start in range(0, 12, size)]
    weights = torch.cat([ratios(new[rows], old[rows], owners[rows]) for rows in chunks])
    torch.testing.assert_close(weights, prefix_ratios(new, old, owners, 3.0))
    assert (weights == 3.0).any()  # what is cut off is not lost for what comes later


def test_what_an_environment_said_has_no_ratio_of_its_own() -> None:
    difference = torch.tensor([0.5, 9.0, -9.0, 0.25, 1.0])
    own = torch.tensor([True, False, False, True, True])
    weights = PrefixRatios(100.0)(difference, torch.zeros(5), torch.zeros(5, dtype=torch.long), own)
    assert weights.log().tolist() == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.75])


@pytest.mark.parametrize("size", [3, 1000])
def test_the_objective_weights_each_tokens_divergence_and_says_by_how_much(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scored = make_scored(4, k=4, response_tokens=(5, 12))
    first = scored[0].trajectory
    mask = np.arange(len(first.response_ids)) % 3 != 1
    scored[0] = replace(scored[0], trajectory=replace(first, loss_mask=mask))
    plain, config = LossConfig(top_k=4), LossConfig(top_k=4, importance_clip=1.5)
    batch = training_batch(scored, config)
    tokens = len(batch.owners)
    logits = torch.randn(tokens, 6, generator=generator).requires_grad_()
    sampled = batch.engine_sampled + 0.3 * torch.randn(tokens, generator=generator)

    def value(objective: Objective, rows: slice) -> torch.Tensor:
        logprobs = logits[rows].log_softmax(-1)
        return objective(ChunkView(rows, logprobs[:, :4], logprobs[:, 4:].logsumexp(-1), sampled[rows]))

    weighted = Objective(batch, config)
    total = torch.stack([value(weighted, slice(i, min(i + size, tokens))) for i in range(0, tokens, size)]).sum()
    difference = torch.where(batch.own, sampled - batch.engine_sampled, 0.0)
    expected_weights = prefix_ratios(difference, torch.zeros(tokens), batch.owners, 1.5)
    alone = torch.stack([value(Objective(batch, plain), slice(i, i + 1)) for i in range(tokens)])
    expected = (expected_weights * alone).sum()
    torch.testing.assert_close(total, expected)
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    sums, counted = weighted.metric_sums(), expected_weights[batch.weights > 0]
    share = sums["importance/mean"] ** 2 / sums["importance/squared"] / len(counted)
    assert share == pytest.approx(effective_share(counted))
    assert share < 0.99


def test_weights_are_refused_where_the_two_log_probs_cannot_be_compared() -> None:
    base = {"run": {"name": "r"}, "student": {"model": "m"}, "context": {"text": "c"}, "data": {"train": "t"}}
    assert validate(Config, {**base, "loss": {"importance_clip": 2.0}}).loss.importance_clip == 2.0
    for rollout, loss in (
        ({"temperature": 0.7}, {}),
        ({"top_p": 0.9}, {}),
        ({}, {"form": "policy_gradient"}),
    ):
        with pytest.raises(ConfigError, match=r"loss\.importance_clip"):
            validate(Config, {**base, "rollout": rollout, "loss": {"importance_clip": 2.0, **loss}})
