"""TextArena's single-player grid games without the rules in the prompt, as the paper plays them.

The prompt says that the student moves P and how to write a move. Only the context says what the symbols mean. The last
move in square brackets counts. An answer without one, or a move into a wall, is illegal: the first costs a turn, a
second in a row loses the game. Success is a reward of exactly 1.0; a lost game may have a partial reward.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from typing import Any

from textarena.core import ObservationType
from textarena.envs.FrozenLake.env import FrozenLakeEnv
from textarena.envs.Sokoban.env import SokobanEnv

from rollout_workers.environments.base import EpisodeError, Step

INTRODUCTION = (
    "You move P on the grid, one step each turn. Choose the step that leads to the goal in as few turns as possible. "
    "There are four steps: up, down, left and right (or w, s, a and d). Write the one you choose in square brackets: "
    "[up], [down], [left] or [right]."
)
QUESTION = "Which step do you take? End your answer with it, in square brackets."
NO_MOVE = "no valid action"

_MOVE = re.compile(r"\[\s*(up|down|left|right|w|a|s|d)\s*\]", re.IGNORECASE)
_ONE_AT_A_TIME = threading.Lock()
"""TextArena seeds Python's global generator and builds rooms in module variables."""


def last_move(answer: str) -> str | None:
    """The last bracketed move of an answer, in lower case."""
    moves = _MOVE.findall(answer)
    return moves[-1].lower() if moves else None


class TextGame:
    """A TextArena game as an `Environment`.

    With `history` an observation repeats everything since the start, so it can be a prompt alone; without, it holds
    only the news, for conversations.
    """

    def __init__(self, game: Any, *, history: bool) -> None:
        self._game = game
        self._history = history
        self._log: list[str] = []
        self._playing = False

    async def reset(self, seed: int) -> str:
        """Start the game of `seed`; returns the board."""
        # A room of several boxes takes most of a second to build, too long for the engine's event loop.
        await asyncio.to_thread(self._reset, seed)
        self._playing = True
        self._log = []
        return self._observe()

    async def step(self, answer: str) -> Step:
        """Make the last move in `answer`."""
        if not self._playing:
            raise EpisodeError("this game is over, or was never reset")
        done, _ = self._game.step(f"[{last_move(answer) or NO_MOVE}]")
        if not done:
            return Step(self._observe(), 0.0, done=False)
        self._playing = False
        rewards, information = self._game.close()
        return Step(str(information[0]["reason"]), float(rewards[0]), done=True)

    def _reset(self, seed: int) -> None:
        with _ONE_AT_A_TIME:
            state = random.getstate()
            try:
                self._game.reset(num_players=1, seed=seed)
            finally:
                random.setstate(state)

    def _observe(self) -> str:
        """TextArena's messages since the last observation, without its rules."""
        first = not self._log
        _, messages = self._game.get_observation()
        new = [
            f"[Player] {text}" if kind is ObservationType.PLAYER_ACTION else f"[Game] {text.strip()}"
            for _, text, kind in messages
            if kind is not ObservationType.PROMPT
        ]
        self._log += new
        shown = self._log if self._history else [entry for entry in new if not entry.startswith("[Player]")]
        introduction = [INTRODUCTION] if first or self._history else []
        return "\n\n".join([*introduction, *shown, QUESTION])


class FrozenLake(TextGame):
    """A walk over a frozen lake with holes, from top left to bottom right; the paper's is 3 by 3 with two holes."""

    def __init__(self, *, size: int = 3, holes: int = 2, history: bool = True) -> None:
        super().__init__(FrozenLakeEnv(size=size, num_holes=holes), history=history)


class Sokoban(TextGame):
    """A room in which boxes must be pushed onto targets; the paper's is 6 by 6 with one box."""

    def __init__(self, *, size: int = 6, boxes: int = 1, history: bool = True) -> None:
        super().__init__(SokobanEnv(dim_room=(size, size), num_boxes=boxes), history=history)
