"""Frozen Lake as text, in more worlds than the real one: what a model from nothing is trained on.

The texts are those of ``game:FrozenLake?history=false``, letter by letter. In each world G and H mean something else,
and a line, the context, says what. The boards are the same in all worlds, so that they do not tell.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

Cell = tuple[int, int]
Board = tuple[str, ...]
"""Rows of cells: ``G``, ``H`` or a blank."""

SIDE = 3
HOLES = (1, 2, 3)
"""In a lake: one of these. The paper's have two."""
MOST_TURNS = 5
NO_MOVE = "?"
"""An answer that is no move."""
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
START, LAST = (0, 0), (SIDE - 1, SIDE - 1)


@dataclass(frozen=True, slots=True)
class World:
    """What the letter that is the goal, and the other one, are. A hole ends the game, ice is walked over."""

    goal: str
    deadly: bool

    @property
    def other(self) -> str:
        """The letter that is not the goal."""
        return "GH".replace(self.goal, "")

    @property
    def context(self) -> str:
        """The line that says what the letters mean."""
        meaning = {self.goal: "the goal", self.other: "a hole" if self.deadly else "ice"}
        return f"G is {meaning['G']}, H is {meaning['H']}."

    def __str__(self) -> str:
        return f"{self.goal}-{self.other if self.deadly else 'none'}"


REAL = World("G", deadly=True)
WORLDS = (REAL, World("G", deadly=False), World("H", deadly=True), World("H", deadly=False))

# --- what the environment says ---------------------------------------------------------------------------------------

INTRODUCTION = (
    "You move P on the grid, one step each turn. Choose the step that leads to the goal in as few turns as possible. "
    "There are four steps: up, down, left and right (or w, s, a and d). Write the one you choose in square brackets: "
    "[up], [down], [left] or [right].\n\n"
)
LINE = "+" + "-----+" * SIDE + "\n"
HEAD = "[Game] Current Board:\n\n" + LINE
QUESTION = (
    "\nAvailable Actions: [up], [down], [left], [right], [w], [a], [s], [d]\n\n"
    "Which step do you take? End your answer with it, in square brackets."
)


def shown(board: Board, player: Cell) -> str:
    """The board with P on it, and the question."""
    rows = ("".join(f"|{_sign(board, (r, c), player):^5}" for c in range(SIDE)) + f"|\n{LINE}" for r in range(SIDE))
    return HEAD + "".join(rows) + QUESTION


def told(move: str, where: Cell | None) -> str:
    """What stands ahead of the board after `move`, which led to `where`: nowhere, if into a wall."""
    if where is not None:
        return f"[Game] You moved {move} to position ({where[0]}, {where[1]}).\n\n"
    reason = f"You tried to move {move} but hit a wall!"
    if move == NO_MOVE:
        reason = "Invalid action format. Use [up], [down], [left], [right] or [w], [a], [s], [d]."
    return (
        f"[Game] You attempted an invalid move. Reason: {reason} "
        "Please resubmit a valid move and remember to follow the game rules to avoid penalties.\n\n"
    )


def fragments() -> list[str]:
    """Texts of which all that is said consists: each is one token."""
    answers = [*MOVES, NO_MOVE]
    refused = [told(move, None) for move in answers]
    moved = [told(move, START).partition("(")[0] for move in MOVES]
    cells = [f"({r}, {c}).\n\n" for r in range(SIDE) for c in range(SIDE)]
    signs = [f"|{sign:^5}" for sign in ("", "P", "H", "G", "P/G")]
    meanings = ["G is ", "H is ", "the goal", "a hole", "ice"]
    ends = [f"|\n{LINE}", f"|\n{LINE}{QUESTION}"]
    return [INTRODUCTION, HEAD, *refused, *moved, *cells, *signs, *ends, *(f"[{one}]" for one in answers), *meanings]


def _sign(board: Board, cell: Cell, player: Cell) -> str:
    there = board[cell[0]][cell[1]]
    if cell != player:
        return there
    return "P/G" if there == "G" else "P"


# --- how it is played ------------------------------------------------------------------------------------------------


@cache
def boards() -> tuple[Board, ...]:
    """All that the environment makes: the goal in the last corner, holes anywhere that leaves a way, fewest first."""
    free = [(r, c) for r in range(SIDE) for c in range(SIDE) if (r, c) not in (START, LAST)]
    made = (_board(frozenset(holes)) for count in HOLES for holes in itertools.combinations(free, count))
    return tuple(board for board in made if START in distances(board, REAL))


def _board(holes: frozenset[Cell]) -> Board:
    return tuple(
        "".join("G" if (r, c) == LAST else "H" if (r, c) in holes else " " for c in range(SIDE)) for r in range(SIDE)
    )


def after(player: Cell, move: str) -> Cell | None:
    """Where `move` leads; None into a wall, or if it is none."""
    if move not in MOVES:
        return None
    r, c = player[0] + MOVES[move][0], player[1] + MOVES[move][1]
    return (r, c) if 0 <= r < SIDE and 0 <= c < SIDE else None


@cache
def distances(board: Board, world: World) -> dict[Cell, int]:
    """Moves to the nearest goal without a hole, from where there is a way."""
    cells = [(r, c) for r in range(SIDE) for c in range(SIDE)]
    found = {cell: 0 for cell in cells if board[cell[0]][cell[1]] == world.goal}
    reached = list(found)
    for cell in reached:  # grows while it is walked through
        for move in MOVES:
            before = after(cell, move)
            if before is None or before in found or (world.deadly and board[before[0]][before[1]] == world.other):
                continue
            found[before] = found[cell] + 1
            reached.append(before)
    return found


@cache
def best_moves(board: Board, world: World, player: Cell) -> tuple[str, ...]:
    """The first moves of all shortest safe ways to a goal."""
    far = distances(board, world)
    return tuple(move for move in MOVES if far.get(after(player, move) or player, SIDE**2) < far[player])


@dataclass(frozen=True, slots=True)
class Turn:
    """Where the player is, what it sees, the moves that are right there, and the one that is made."""

    player: Cell
    observation: str
    right: tuple[str, ...]
    made: str


def game(chance: random.Random, board: Board, world: World, *, stray: float) -> Iterator[Turn]:
    """A game from the start to its end, or `MOST_TURNS`; a share `stray` of its moves is any, right or not. The second
    in a row that cannot be made would end the game, so there is none.
    """
    player, said, refused = START, INTRODUCTION, False
    for _ in range(MOST_TURNS):
        right = best_moves(board, world, player)
        made = chance.choice(right)
        if chance.random() < stray:
            made = chance.choice([move for move in (*MOVES, NO_MOVE) if not refused or after(player, move)])
        yield Turn(player, said + shown(board, player), right, made)
        where = after(player, made)
        refused = where is None
        player = where or player
        if board[player[0]][player[1]] in (world.goal, world.other * world.deadly):
            return
        said = told(made, where)


def conversation(turns: Sequence[Turn], context: str) -> list[dict[str, str]]:
    """A game as chat messages, the context ahead of the first, the last move made."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        ahead = "" if messages or not context else f"{context}\n\n"
        messages.append({"role": "user", "content": ahead + turn.observation})
        messages.append({"role": "assistant", "content": f"[{turn.made}]"})
    return messages
