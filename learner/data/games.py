"""Rows that are played: checked, and rendered as far as they can be before anything is played.

Besides the wiring this is the only file of the learner that knows of environments: they are tried in this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.config.model import Config, ConfigError
from common.data.rendering import Renderer
from common.data.rows import DataError, Message, Row
from common.protocol.schema import Game, Prompt
from rollout_workers.environments.registry import make_environment


@dataclass(frozen=True, slots=True)
class Turn:
    """A row as the turn that is rendered; of a game its first one, with what is played."""

    row: Row
    game: Game | None = None

    def render(self, renderer: Renderer) -> Prompt:
        """As tokens, under the renderer's context."""
        prompt = renderer.render(self.row)
        return prompt if self.game is None else replace(prompt, game=self.game)


def game_of(row: Row) -> Game | None:
    """What is played for `row`; None where it is a prompt."""
    return None if row.environment is None else Game(row.environment, row.options, row.seed)


def fault_of(row: Row) -> str | None:
    """Why the environment that `row` names cannot be made; None where it can, or where the row is a prompt."""
    if row.environment is None:
        return None
    try:
        make_environment(row.environment, row.options)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def render(row: Row, renderer: Renderer) -> Prompt:
    """`row` as tokens; a game as its first turn, which names the context that all its turns have.

    Raises DataError for an environment that cannot begin.
    """
    return first_turn(row).render(renderer)


def first_turn(row: Row) -> Turn:
    """What is rendered of `row`; a game is begun for it. Raises DataError for an environment that cannot begin."""
    game = game_of(row)
    if game is None:
        return Turn(row)
    try:
        observation = asyncio.run(make_environment(game.environment, game.options).reset(game.seed))
    except (ValueError, TypeError) as error:
        raise DataError(f"row {row.id!r}: {game.environment} cannot begin at seed {game.seed}: {error}") from error
    turn = Row(id=row.id, messages=(Message(role="user", content=observation),), answer=row.answer, teacher=row.teacher)
    return Turn(turn, game)


def refuse_unplayable(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError where games are to be trained in a way that takes single answers only."""
    if not any(prompt.game for prompt in prompts):
        return
    if config.rollout.source == "teacher":
        raise ConfigError("data.train has games, which the teacher does not play: rollout.source must be `student`")
    if config.rollout.topk_from == "learner" or config.teacher.kind == "base":
        raise ConfigError(
            "data.train has games, whose answers the rollout workers have scored: rollout.topk_from must be `engine`, "
            "and teacher.kind not `base`"
        )
