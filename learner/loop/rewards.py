"""Rewards of a step's rollouts, and each one's advantage within the responses to its prompt. Pure."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from common.config.model import Config
from common.evaluation.graders import make_reward
from learner.errors import RunError
from learner.loop.step_stats import ScoredRollout

Reward = Callable[[str, str], float]
"""(answer of the model, expected answer) -> reward."""


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the others; 0 for a single one.

    This baseline does not depend on the response, so the policy gradient with it is unbiased.
    """
    others = len(rewards) - 1
    total = sum(rewards)
    return [reward - (total - reward) / others if others else 0.0 for reward in rewards]


class RewardGroups:
    """Holds each rollout until all responses to its prompt have been scored, then adds reward and advantage."""

    def __init__(self, samples_per_prompt: int, reward: Reward) -> None:
        self._size = samples_per_prompt
        self._reward = reward
        self._groups: dict[int, list[ScoredRollout]] = {}

    def add(self, rollout: ScoredRollout) -> list[ScoredRollout]:
        """Take a rollout; returns its whole group if it is the last, else nothing. Raises RunError for a reward that is
        no finite number.
        """
        number = rollout.sample.number // self._size
        group = self._groups.setdefault(number, [])
        group.append(replace(rollout, reward=self._reward_of(rollout)))
        return _with_advantages(self._groups.pop(number)) if len(group) == self._size else []

    def flush(self) -> list[ScoredRollout]:
        """The rollouts of groups that lost a member, which the teacher failed to score."""
        groups, self._groups = self._groups, {}
        return [rollout for group in groups.values() for rollout in _with_advantages(group)]

    def _reward_of(self, rollout: ScoredRollout) -> float:
        if rollout.episode is not None:
            reward = float(rollout.episode.reward)
        else:
            reward = self._reward(str(rollout.summary.text), str(rollout.sample.prompt.answer))
        if not math.isfinite(reward):
            raise RunError(f"the reward of sample {rollout.sample.sample_id} is {reward}, expected a finite number")
        return reward


def reward_groups(config: Config) -> RewardGroups | None:
    """The groups of a run; None without ``loss.reward_weight``."""
    if not config.loss.reward_weight:
        return None
    return RewardGroups(config.rollout.samples_per_prompt, make_reward(config.loss.reward or config.eval.grader))


async def rewarded(groups: RewardGroups | None, rollouts: AsyncIterator[ScoredRollout]) -> AsyncIterator[ScoredRollout]:
    """The rollouts, with `groups` as soon as all responses to their prompt are there."""
    async for rollout in rollouts:
        for one in (rollout,) if groups is None else groups.add(rollout):
            yield one
    for one in () if groups is None else groups.flush():
        yield one


def _with_advantages(group: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    values = advantages([float(one.reward or 0.0) for one in group])
    return [replace(one, advantage=value) for one, value in zip(group, values, strict=True)]
