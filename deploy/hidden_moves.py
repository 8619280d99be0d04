"""A game made from nothing, for machines without models: what the words for moves mean is not told.

P and G stand on squares of a frozen lake, four by four, and every turn one of `WORDS` is said. Which word goes which
way is the lake's rule, one of 24; only playing shows it, or a list of items that says it. ``G: right 2, up 1`` is an
observation, where the goal lies from P; ``right: dax`` a move (the last word counts, what stands before it is the
player's own), and then the lake says ``P went down. G: right 2, up 2``. Past the edge P falls off and the game is lost.
An item is ``right: dax``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from rollout_workers.environments.base import EpisodeError, Step

WORDS = ("dax", "wug", "fep", "zon")
STEPS: Mapping[str, tuple[int, int]] = {"up": (0, 1), "down": (0, -1), "left": (-1, 0), "right": (1, 0)}
SIZE = 4
TURNS = 4
DISTANCES = range(2, TURNS)
"""From P to G when a game begins, in steps."""
RULES: tuple[Mapping[str, str], ...] = tuple(
    dict(zip(WORDS, ways, strict=True)) for ways in itertools.permutations(STEPS)
)
"""Word -> way, all that there are."""

Square = tuple[int, int]
SQUARES: tuple[Square, ...] = tuple((x, y) for x in range(SIZE) for y in range(SIZE))


class HiddenMoves:
    """The game as an environment: ``deploy.hidden_moves:HiddenMoves``, with the number of its rule.

    With `told` every observation begins with the whole rule, as a list of items: a game that needs no context.
    """

    def __init__(self, *, rule: int, told: bool = False) -> None:
        if not 0 <= rule < len(RULES):
            raise ValueError(f"rule {rule}: 0 to {len(RULES) - 1}")
        self._rule = RULES[rule]
        self._lead = f"{listed(items_of(self._rule))}\n\n" if told else ""
        self._turns = TURNS
        self._player, self._goal = SQUARES[0], SQUARES[0]

    async def reset(self, seed: int) -> str:
        """The squares of `seed`."""
        self._player, self._goal = beginning(random.Random(seed))
        self._turns = 0
        return self._lead + observation(self._player, self._goal)

    async def step(self, answer: str) -> Step:
        """Make the move that `answer` ends with; anything but one of the words leaves P where it is."""
        if self._turns >= TURNS:
            raise EpisodeError("this game is over, or was never reset")
        self._turns += 1
        way = self._rule.get((answer.split() or [""])[-1])
        after = self._player if way is None else moved(self._player, way)
        self._player = after or self._player
        won = after == self._goal
        if won or after is None or self._turns == TURNS:
            self._turns = TURNS
            return Step(feedback(way, after, self._goal), float(won), done=True)
        return Step(self._lead + feedback(way, after, self._goal), 0.0, done=False)


def beginning(chance: random.Random) -> tuple[Square, Square]:
    """Where P and G stand at first, `DISTANCES` apart."""
    pairs = [(p, g) for p in SQUARES for g in SQUARES if abs(p[0] - g[0]) + abs(p[1] - g[1]) in DISTANCES]
    return chance.choice(pairs)


def moved(square: Square, way: str) -> Square | None:
    """The square beside `square`; None past the edge."""
    x, y = square[0] + STEPS[way][0], square[1] + STEPS[way][1]
    return (x, y) if 0 <= x < SIZE and 0 <= y < SIZE else None


def ways_to(player: Square, goal: Square) -> dict[str, int]:
    """Way -> how many steps of it lead to `goal`; the longest first."""
    across, along = goal[0] - player[0], goal[1] - player[1]
    ways = {"right" if across > 0 else "left": abs(across), "up" if along > 0 else "down": abs(along)}
    return {way: steps for way, steps in sorted(ways.items(), key=lambda one: -one[1]) if steps}


def observation(player: Square, goal: Square) -> str:
    """What is seen: where the goal lies."""
    return f"G: {', '.join(f'{way} {steps}' for way, steps in ways_to(player, goal).items()) or 'here'}"


def feedback(way: str | None, player: Square | None, goal: Square) -> str:
    """What is seen after a move: `way` is None where it was none, `player` where P fell off."""
    if player is None:
        return f"P went {way} and fell off"
    return f"P {f'went {way}' if way else 'stayed'}. {observation(player, goal)}"


def items_of(rule: Mapping[str, str], ways: Sequence[str] = tuple(STEPS)) -> tuple[str, ...]:
    """What `rule` says of `ways`, an item each."""
    words = {way: word for word, way in rule.items()}
    return tuple(f"{way}: {words[way]}" for way in ways)


def listed(items: Sequence[str]) -> str:
    """Items as a context has them, a line each."""
    return "\n".join(f"- {item}" for item in items)
