"""Plays the games of a run, and turns episodes into trajectories. All but `play_sample` is pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import xxhash

from common.config.model import EnvironmentConfig
from common.data.rendering import Renderer
from common.protocol.schema import Ids, Sample, Sampling, Trajectory
from rollout_workers.environments.episodes import Episode, Exchange, play_episode
from rollout_workers.environments.registry import make_environment

if TYPE_CHECKING:
    from rollout_workers.engine.engine import Generation, RolloutEngine


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """Totals of an episode, for the driver: sequences for the learner, answers, sum of rewards."""

    sequences: int
    turns: int
    reward: float
    success: bool


@dataclass(frozen=True, slots=True)
class Played:
    """An episode as text, for evaluations."""

    exchanges: tuple[Exchange, ...]
    outcome: str
    reward: float
    success: bool


async def play_sample(
    engine: RolloutEngine,
    renderer: Renderer,
    settings: EnvironmentConfig,
    sample: Sample,
    *,
    in_context: bool = False,
    own_context: str | None = None,
) -> Episode:
    """Play the game of `sample.prompt`; every turn has its own seed. `own_context` is the context of this row alone."""
    game = sample.prompt.game
    assert game is not None

    async def generate(prompt_ids: Ids, turn: int) -> Generation:
        return await engine.generate(prompt_ids, turn_sampling(sample.sampling, turn), f"{sample.sample_id}/{turn}")

    return await play_episode(
        make_environment(game.environment, game.options),
        game.seed,
        generate,
        renderer,
        episode_id=sample.sample_id,
        max_turns=settings.max_turns,
        samples=settings.sample_format,
        in_context=in_context,
        own_context=own_context,
        text_of=lambda ids: engine.answer_text(ids, sample.sampling.stop),
        max_prompt_tokens=engine.max_sequence_tokens - sample.sampling.max_tokens,
    )


def turn_sampling(sampling: Sampling, turn: int) -> Sampling:
    """`sampling` with the seed of one turn, a function of the sample's seed."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=xxhash.xxh32_intdigest(f"{sampling.seed}/{turn}".encode()) & 0x7FFFFFFF)


def trajectories_of(episode: Episode, sample: Sample) -> list[Trajectory]:
    """The episode's sequences, named ``SAMPLE_ID/NUMBER``; row and teacher are the sample's."""
    return [
        Trajectory(
            sample_id=f"{sample.sample_id}/{number}",
            step=sample.step,
            prompt=replace(
                one.prompt,
                row_id=sample.prompt.row_id,
                teacher=sample.prompt.teacher,
                context_id=sample.prompt.context_id,
            ),
            response_ids=one.generation.response_ids,
            sampled_logprobs=one.generation.sampled_logprobs,
            topk_ids=one.generation.topk_ids,
            finish_reason=one.generation.finish_reason,
            versions=one.generation.versions,
            loss_mask=one.loss_mask,
        )
        for number, one in enumerate(episode.samples)
    ]


def student_tokens(trajectories: Sequence[Trajectory]) -> int:
    """Response tokens that the student made, without the environment's."""
    return sum(len(t.response_ids) if t.loss_mask is None else int(t.loss_mask.sum()) for t in trajectories)


def spans_of(trajectories: Sequence[Trajectory]) -> tuple[tuple[int, int], ...]:
    """Version spans over the concatenated responses: (first position, weight version)."""
    spans: list[tuple[int, int]] = []
    start = 0
    for trajectory in trajectories:
        for position, version in trajectory.versions:
            if not spans or spans[-1][1] != version:
                spans.append((start + position, version))
        start += len(trajectory.response_ids)
    return tuple(spans)
