"""Game rows: validated and rendered as their first turn, with environments that run in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace

from common.config.model import Config, ConfigError
from common.data.rendering import Renderer
from common.data.rows import DataError, Message, Row
from common.protocol.schema import Game, Prompt
from rollout_workers.environments.registry import make_environment


@dataclass(frozen=True, slots=True)
class FirstTurn:
    """The row to render: a prompt, or the first observation of `game`."""

    row: Row
    game: Game | None = None

    def render(self, renderer: Renderer) -> Prompt:
        """Tokens of the row with the renderer's context."""
        prompt = renderer.render(self.row)
        if columns := self.row.columns:
            prompt = replace(prompt, row=columns)
        return prompt if self.game is None else replace(prompt, game=self.game)


def environment_error(row: Row) -> str | None:
    """Error of making the environment that `row` names; None if it can be made or the row is a prompt."""
    if row.environment is None:
        return None
    try:
        make_environment(row.environment, row.options)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def first_turn(row: Row) -> FirstTurn:
    """The row itself, or the first observation of its game. Raises DataError for an environment that cannot begin."""
    if row.environment is None:
        return FirstTurn(row)
    game = Game(row.environment, row.options, row.seed, row.context)
    try:
        environment = make_environment(game.environment, game.options)
        observation = asyncio.run(environment.reset(game.seed))
    except (ValueError, TypeError) as error:
        raise DataError(f"row {row.id!r}: {game.environment} cannot begin at seed {game.seed}: {error}") from error
    message = Message(role="user", content=observation)
    first = Row(
        id=row.id,
        messages=(message,),
        answer=row.answer,
        teacher=row.teacher,
        context=row.context,
        tools=getattr(environment, "tools", None),
    )
    return FirstTurn(first, game)


def refuse_games_if_unsupported(games: Collection[FirstTurn], config: Config) -> None:
    """Raise ConfigError if there are games and the settings take single answers only."""
    rollout, teacher = config.rollout, config.teacher
    if not games:
        return
    if config.context.from_rollout is not None:
        raise ConfigError("data.train has games: context.from_rollout makes the context of a single answer")
    if rollout.teacher_answers:
        raise ConfigError(
            "data.train has games, which the teacher does not play: rollout.source must be `student`, without "
            "rollout.mix"
        )
    if config.environment.sample_format == "observation" and any(game.row.tools for game in games):
        raise ConfigError(
            "data.train has environments with tools: environment.sample_format must be `conversation` or `chat`, since "
            "an observation alone does not show what a tool's result belongs to"
        )
    if rollout.topk_from == "learner" or teacher.kind == "base":
        raise ConfigError(
            "data.train has games, whose answers the rollout workers have scored: rollout.topk_from must be `engine`, "
            "and teacher.kind not `base`"
        )
