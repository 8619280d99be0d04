"""Rewards: groups, advantages, and what of them reaches the learner."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config.loader import validate
from common.config.model import Config, ConfigError
from common.evaluation.graders import make_reward
from common.protocol.schema import Sample, Sampling
from learner.errors import RunError
from learner.loop.rewards import RewardGroups, advantages
from learner.loop.step_stats import ScoredRollout
from learner.trainer.losses import reward_term
from tests.support.stub_loop import ROWS, OrderedServices, config_of, loop_over


@pytest.mark.parametrize("samples", [2, 3])
def test_the_gradient_is_that_of_the_expected_reward(samples: int) -> None:
    """Every outcome of `samples` draws from three answers, weighted by its probability, in float64."""
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=samples):
        logprobs = logits.log_softmax(-1)[list(drawn)]
        weights = torch.tensor(advantages([float(rewards[one]) for one in drawn]))
        probability = logprobs.sum().exp().detach()
        total = total + probability * reward_term(logprobs, logprobs.detach(), weights).double().mean()
    (found,) = torch.autograd.grad(total, logits)
    (expected,) = torch.autograd.grad(-(logits.softmax(-1) * rewards).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_ratio_corrects_for_the_sampler_and_is_cut() -> None:
    student, behaviour, advantage = torch.tensor([-1.0]), torch.tensor([-2.0]), torch.tensor([3.0])
    assert reward_term(student, behaviour, advantage).item() == pytest.approx(-3 * math.e, rel=1e-6)
    assert reward_term(student, behaviour, advantage, ratio_clip=1.5).item() == pytest.approx(-4.5, rel=1e-6)


def test_advantages_are_against_the_others() -> None:
    assert advantages([1.0, 0.0, 0.0]) == pytest.approx([1.0, -0.5, -0.5])
    assert advantages([0.7, 0.7]) == pytest.approx([0.0, 0.0])
    assert advantages([1.0]) == [0.0]


def rollout(number: int, text: str = "no", episode: Any = None) -> ScoredRollout:
    prompt = replace(ROWS[0], answer="yes")
    sample = Sample(number, 0, f"s{number}", prompt, Sampling(8))
    return ScoredRollout(sample, SimpleNamespace(text=text, episode=episode), f"item {number}", None, ())


def test_a_group_is_passed_on_when_its_last_response_arrives() -> None:
    groups = RewardGroups(2, make_reward("exact"))
    assert groups.add(rollout(0, "yes")) == []
    assert groups.add(rollout(3)) == []
    first = groups.add(rollout(1))
    assert [(one.item, one.reward, one.advantage) for one in first] == [("item 0", 1.0, 1.0), ("item 1", 0.0, -1.0)]
    assert [(one.item, one.advantage) for one in groups.flush()] == [("item 3", 0.0)]  # its partner had no score
    assert groups.flush() == []


def test_an_environment_gives_its_own_reward() -> None:
    groups = RewardGroups(2, make_reward("exact"))
    groups.add(rollout(0, episode=SimpleNamespace(reward=0.25)))
    assert [one.advantage for one in groups.add(rollout(1, episode=SimpleNamespace(reward=0.75)))] == [-0.5, 0.5]


def length(answer: str, expected: str) -> float:
    """A reward of the user's."""
    return math.inf if answer == "endless" else len(answer) / 10


def test_a_users_function_gives_a_number_and_a_grader_a_verdict() -> None:
    assert make_reward("tests.unit.learner.loop.test_rewards:length")("four", "") == 0.4
    assert make_reward("contains")("so yes", "yes") == 1.0
    assert make_reward("regex:(y.*)")("so yes", "yes") == 1.0
    with pytest.raises(ConfigError, match="valid are"):
        make_reward("none")


def test_a_reward_that_is_no_number_ends_the_run_with_the_sample() -> None:
    groups = RewardGroups(2, make_reward("tests.unit.learner.loop.test_rewards:length"))
    with pytest.raises(RunError, match="the reward of sample s0 is inf"):
        groups.add(rollout(0, "endless"))


class Graded(OrderedServices):
    """Every prompt's second response is right; the learner's calls are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.accumulated: list[Any] = []

    def _summary(self, sample: Sample, version: int) -> Any:
        summary = super()._summary(sample, version)
        summary.text = "yes" if sample.number % 2 else "no"
        return summary

    def accumulate(self, group: Any) -> list[Any]:
        self.accumulated += [item for share in group for item in share]
        return super().accumulate(group)


async def test_advantages_reach_the_learner_with_their_responses_and_the_metrics() -> None:
    config = config_of(samples_per_prompt=2)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"reward_weight": 0.5})})
    services = Graded()
    rows = [replace(row, answer="yes") for row in ROWS]
    loop = loop_over(services, config, prompts=rows)
    await loop.begin(0)
    outcome = await loop.step(0)
    await loop.close()
    assert len(services.accumulated) == 8
    assert {tuple(more) for item, *more in services.accumulated if item.endswith("/1")} == {(1.0, "train")}
    assert {tuple(more) for item, *more in services.accumulated if item.endswith("/0")} == {(-1.0, "train")}
    assert (outcome.metrics["reward/mean"], outcome.metrics["reward/signal"]) == (0.5, 1.0)


async def test_without_a_weight_nothing_is_graded() -> None:
    services = Graded()
    loop = loop_over(services, config_of(samples_per_prompt=2))
    await loop.begin(0)
    outcome = await loop.step(0)
    await loop.close()
    assert {advantage for _, advantage, _ in services.accumulated} == {0.0}
    assert "reward/mean" not in outcome.metrics


@pytest.mark.parametrize(
    ("rollout", "loss", "why"),
    [
        ({"samples_per_prompt": 1}, {}, r"rollout\.samples_per_prompt \(1\) must be 2"),
        ({"max_staleness": 1}, {}, "in one step"),
        ({"oversample_fraction": 0.5}, {}, "in one step"),
        ({"top_p": 0.9}, {}, r"loss\.reward_weight compares log-probs"),
        ({"temperature": 0.7}, {}, r"loss\.reward_weight compares log-probs"),
        ({}, {"reward_weight": 0, "reward": "exact"}, "no effect"),
    ],
)
def test_settings_under_which_the_term_would_be_wrong_are_refused(
    rollout: dict[str, Any], loss: dict[str, Any], why: str
) -> None:
    base = {"run": {"name": "r"}, "student": {"model": "m"}, "context": {"text": "c"}, "data": {"train": "t"}}
    fine = {"samples_per_prompt": 4}
    validate(Config, {**base, "rollout": fine, "loss": {"reward_weight": 0.1}})
    with pytest.raises(ConfigError, match=why):
        validate(Config, {**base, "rollout": {**fine, **rollout}, "loss": {"reward_weight": 0.1, **loss}})
