"""Scores from logits against float64: tails of any size, and memory use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.protocol.schema import LOGPROB_FLOOR
from teacher_server.backends.hf.outputs import score_logits


def expected(logits: Tensor, support: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs at `support` and the tail, in float64."""
    logprobs = (logits.double() / temperature).log_softmax(-1)
    outside = logprobs.scatter(-1, support, float("-inf"))
    return logprobs.gather(-1, support), outside.logsumexp(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 5.0, 15.0, 40.0, 90.0])
def test_the_tail_is_exact_however_little_is_in_it(gap: float, temperature: float) -> None:
    """The support has all but e^-gap of the mass: 1 - sum would be zero from a gap of 16 on."""
    generator = torch.Generator().manual_seed(int(gap))
    logits = torch.randn((16, 500), generator=generator)
    support = torch.stack([torch.randperm(500, generator=generator)[:8] for _ in range(16)])
    logits.scatter_add_(-1, support, torch.full((16, 8), gap))
    sampled = support[:, 0]
    at_support, tail = expected(logits, support, temperature)
    values = score_logits(logits.clone(), sampled=sampled, ids=support, mode="at_ids", temperature=temperature, k=0)
    torch.testing.assert_close(values.logprobs.double(), at_support.clamp(min=LOGPROB_FLOOR), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.sampled.double(), at_support[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values.tail.double(), tail.clamp(min=LOGPROB_FLOOR), rtol=1e-5, atol=1e-4)
    assert (values.floored == (tail < LOGPROB_FLOOR)).all()
    assert values.finite.all()


def test_large_logits_cost_no_precision() -> None:
    """Logits of a model without a final norm: float32 steps near 4,000 are 2e-4."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((16, 500), generator=generator) + 4000
    support = torch.stack([torch.randperm(500, generator=generator)[:8] for _ in range(16)])
    at_support, tail = expected(logits, support, 1.0)
    values = score_logits(logits.clone(), sampled=support[:, 0], ids=support, mode="at_ids", temperature=1.0, k=0)
    torch.testing.assert_close(values.logprobs.double(), at_support, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values.tail.double(), tail, rtol=1e-6, atol=1e-6)


def test_a_support_that_is_everything_leaves_nothing() -> None:
    logits = torch.randn((3, 7), generator=torch.Generator().manual_seed(0))
    support = torch.arange(7).expand(3, 7)
    values = score_logits(logits.clone(), sampled=support[:, 0], ids=support, mode="at_ids", temperature=1.0, k=0)
    torch.testing.assert_close(values.logprobs, logits.log_softmax(-1))
    assert (values.tail == LOGPROB_FLOOR).all()
    assert values.finite.all()


def test_without_a_support_all_the_mass_is_outside() -> None:
    logits = torch.randn((3, 7), generator=torch.Generator().manual_seed(0))
    sampled = torch.tensor([0, 3, 6])
    values = score_logits(logits.clone(), sampled=sampled, ids=None, mode="sampled", temperature=1.0, k=0)
    torch.testing.assert_close(values.sampled, logits.log_softmax(-1)[torch.arange(3), sampled])
    torch.testing.assert_close(values.tail, torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5])
def test_nan_and_infinite_logits_are_reported(bad: float, place: int) -> None:
    """In the support or outside it."""
    logits = torch.zeros((2, 7))
    logits[1, place] = bad
    support = torch.tensor([[0, 1]] * 2)
    values = score_logits(logits, sampled=support[:, 1], ids=support, mode="at_ids", temperature=1.0, k=0)
    assert values.finite.tolist() == [True, False]


def test_no_second_copy_of_the_logits_is_made() -> None:
    """Scoring overwrites the logits: a copy would double the memory of a pass."""
    logits = torch.randn((64, 4096))
    support = torch.arange(8).expand(64, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        score_logits(logits, sampled=support[:, 0], ids=support, mode="at_ids", temperature=0.7, k=0)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < logits.nbytes / 4
