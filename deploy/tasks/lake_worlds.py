"""Frozen Lake as text, in the real world and three others: training games for the model of `frozen_lake`.

The texts equal those of ``game:FrozenLake?history=false``, byte for byte. In each world G and H mean something else,
and one line, the context, describes it. All worlds have the same boards, so a board does not reveal its world.
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
"""Possible numbers of holes. The paper's lakes have two."""
MAX_TURNS = 5
NO_MOVE = "?"
"""An answer that is not a move."""
MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
START, LAST = (0, 0), (SIDE - 1, SIDE - 1)


@dataclass(frozen=True, slots=True)
class World:
    """Meaning of the letters. `goal` is one of G and H; the other is a hole, which ends the game, or ice."""

    goal: str
    deadly: bool

    @property
    def other(self) -> str:
        """Return the letter that is not the goal."""
        return "GH".replace(self.goal, "")

    @property
    def context(self) -> str:
        """Return the line that describes the world."""
        meaning = {self.goal: "the goal", self.other: "a hole" if self.deadly else "ice"}
        return f"G is {meaning['G']}, H is {meaning['H']}."

    def __str__(self) -> str:
        return f"{self.goal}-{self.other if self.deadly else 'none'}"


REAL = World("G", deadly=True)
WORLDS = (REAL, World("G", deadly=False), World("H", deadly=True), World("H", deadly=False))

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


def board_text(board: Board, player: Cell) -> str:
    """Return the board with the player P, and the question."""
    rows = ("".join(f"|{_sign(board, (r, c), player):^5}" for c in range(SIDE)) + f"|\n{LINE}" for r in range(SIDE))
    return HEAD + "".join(rows) + QUESTION


def feedback(move: str, cell: Cell | None) -> str:
    """Return the text before the board after `move`, which led to `cell`; None for a refused move."""
    if cell is not None:
        return f"[Game] You moved {move} to position ({cell[0]}, {cell[1]}).\n\n"
    reason = f"You tried to move {move} but hit a wall!"
    if move == NO_MOVE:
        reason = "Invalid action format. Use [up], [down], [left], [right] or [w], [a], [s], [d]."
    return (
        f"[Game] You attempted an invalid move. Reason: {reason} "
        "Please resubmit a valid move and remember to follow the game rules to avoid penalties.\n\n"
    )


def fragments() -> list[str]:
    """Return the texts that all observations and answers are made of; each becomes one token."""
    answers = [*MOVES, NO_MOVE]
    refused = [feedback(move, None) for move in answers]
    moved = [feedback(move, START).partition("(")[0] for move in MOVES]
    cells = [f"({r}, {c}).\n\n" for r in range(SIDE) for c in range(SIDE)]
    signs = [f"|{sign:^5}" for sign in ("", "P", "H", "G", "P/G")]
    meanings = ["G is ", "H is ", "the goal", "a hole", "ice"]
    ends = [f"|\n{LINE}", f"|\n{LINE}{QUESTION}"]
    return [INTRODUCTION, HEAD, *refused, *moved, *cells, *signs, *ends, *(f"[{one}]" for one in answers), *meanings]


def _sign(board: Board, cell: Cell, player: Cell) -> str:
    letter = board[cell[0]][cell[1]]
    if cell != player:
        return letter
    return "P/G" if letter == "G" else "P"


@cache
def boards() -> tuple[Board, ...]:
    """Return all boards of the environment, fewest holes first: goal in the last corner, a path past the holes."""
    free = [(r, c) for r in range(SIDE) for c in range(SIDE) if (r, c) not in (START, LAST)]
    candidates = (_board(frozenset(holes)) for count in HOLES for holes in itertools.combinations(free, count))
    return tuple(board for board in candidates if START in distances(board, REAL))


def _board(holes: frozenset[Cell]) -> Board:
    return tuple(
        "".join("G" if (r, c) == LAST else "H" if (r, c) in holes else " " for c in range(SIDE)) for r in range(SIDE)
    )


def next_cell(player: Cell, move: str) -> Cell | None:
    """Return the cell that `move` leads to; None for a move into a wall and for `NO_MOVE`."""
    if move not in MOVES:
        return None
    r, c = player[0] + MOVES[move][0], player[1] + MOVES[move][1]
    return (r, c) if 0 <= r < SIDE and 0 <= c < SIDE else None


@cache
def distances(board: Board, world: World) -> dict[Cell, int]:
    """Return the number of moves to the nearest goal, for each cell with a safe path."""
    cells = [(r, c) for r in range(SIDE) for c in range(SIDE)]
    found = {cell: 0 for cell in cells if board[cell[0]][cell[1]] == world.goal}
    reached = list(found)
    for cell in reached:  # grows during the iteration
        for move in MOVES:
            before = next_cell(cell, move)
            if before is None or before in found or (world.deadly and board[before[0]][before[1]] == world.other):
                continue
            found[before] = found[cell] + 1
            reached.append(before)
    return found


@cache
def best_moves(board: Board, world: World, player: Cell) -> tuple[str, ...]:
    """Return the first moves of all shortest safe paths to a goal."""
    far = distances(board, world)
    return tuple(move for move in MOVES if far.get(next_cell(player, move) or player, SIDE**2) < far[player])


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: the player's cell, its observation, the right moves and the move made."""

    player: Cell
    observation: str
    right: tuple[str, ...]
    move: str


def game(chance: random.Random, board: Board, world: World, *, stray: float) -> Iterator[Turn]:
    """Play a game to its end, at most `MAX_TURNS`; a share `stray` of the moves is random.

    Never makes two refused moves in a row, because the second would end the environment's game.
    """
    player, lead, refused = START, INTRODUCTION, False
    for _ in range(MAX_TURNS):
        right = best_moves(board, world, player)
        move = chance.choice(right)
        if chance.random() < stray:
            move = chance.choice([one for one in (*MOVES, NO_MOVE) if not refused or next_cell(player, one)])
        yield Turn(player, lead + board_text(board, player), right, move)
        cell = next_cell(player, move)
        refused = cell is None
        player = cell or player
        if board[player[0]][player[1]] in (world.goal, world.other * world.deadly):
            return
        lead = feedback(move, cell)


def conversation(turns: Sequence[Turn], context: str) -> list[dict[str, str]]:
    """Return a game as chat messages, with the context before the first observation and the last move included."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        lead = "" if messages or not context else f"{context}\n\n"
        messages.append({"role": "user", "content": lead + turn.observation})
        messages.append({"role": "assistant", "content": f"[{turn.move}]"})
    return messages
