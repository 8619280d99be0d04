"""Importance weights against expectations that are computed by enumerating every answer."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from learner.importance import effective_share, prefix_ratios, token_ratios

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
