"""Text games: the same by seed, won by whoever plays well, silent about their rules."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from textarena.envs.FrozenLake.env import FrozenLakeEnv
from textarena.envs.Sokoban.env import SokobanEnv

from rollout_workers.environments.base import Environment, EpisodeError, Step
from rollout_workers.environments.registry import make_environment
from rollout_workers.environments.text_games import last_move

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
Cell = tuple[int, int]


# --- a player that reads the board as the student does --------------------------------------------------------------


def last_board(observation: str) -> list[list[str]]:
    """Symbols of the last board in an observation, row by row."""
    lines = observation.rpartition("Current Board:\n\n")[2].partition("\n\n")[0].splitlines()
    if lines[0].startswith("+"):
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [line.split() for line in lines]


def cells(board: Sequence[Sequence[str]], symbols: str) -> set[Cell]:
    return {(r, c) for r, row in enumerate(board) for c, symbol in enumerate(row) if symbol and symbol in symbols}


def solution(board: Sequence[Sequence[str]]) -> list[str]:
    """Shortest winning moves on either game's board, by breadth-first search over (player, boxes)."""
    floor = {(r, c) for r, row in enumerate(board) for c in range(len(row))} - cells(board, "#H")
    (player,) = cells(board, "P")
    targets, boxes = cells(board, "O√"), frozenset(cells(board, "X√"))
    if len(targets) < len(boxes):
        targets.add(player)  # the board shows who stands there
    (goal,) = cells(board, "G") or {None}
    queue = deque([(player, boxes, [])])
    seen = {(player, boxes)}
    while queue:
        at, around, path = queue.popleft()
        if at == goal or (goal is None and around == targets):
            return path
        for name, (dr, dc) in MOVES.items():
            to, beyond = (at[0] + dr, at[1] + dc), (at[0] + 2 * dr, at[1] + 2 * dc)
            pushed = around - {to} | {beyond} if to in around else around
            if to in floor and (to not in around or (beyond in floor and beyond not in around)):
                state = (to, pushed)
                if state not in seen:
                    seen.add(state)
                    queue.append((*state, [*path, name]))
    raise AssertionError("no way to win")


async def play(environment: Environment, seed: int, answers: Sequence[str]) -> list[Any]:
    """The first observation, then the steps up to the end."""
    seen: list[Any] = [await environment.reset(seed)]
    for answer in answers:
        seen.append(await environment.step(answer))
        if seen[-1].done:
            break
    return seen


games = pytest.mark.parametrize("name", ["FrozenLake", "Sokoban"])


@games
async def test_who_plays_well_wins_with_reward_one(name: str) -> None:
    lengths = set()
    for seed in range(25):
        environment = make_environment(name)
        observation = await environment.reset(seed)
        way = solution(last_board(observation))
        if name == "Sokoban":
            assert (len(last_board(observation)), len(cells(last_board(observation), "X"))) == (6, 1)
        lengths.add(len(way))
        for number, move in enumerate(way, start=1):
            # Planned anew from each observation, so every board that is shown must be the true one.
            assert len(solution(last_board(observation))) == len(way) - number + 1
            step = await environment.step(f"A long thought about [left] or [up]. So I go [{move}]")
            observation = step.observation
            assert step.done == (number == len(way))
            assert step.reward == (1.0 if step.done else 0.0)
    assert lengths == {4} if name == "FrozenLake" else len(lengths) > 3


@games
async def test_an_episode_is_a_function_of_its_seed(name: str) -> None:
    answers = ["[right]", "[down]", "[left]", "[right]", "[up]"]
    first = [await play(make_environment(name), seed, answers) for seed in range(8)]
    random.seed(99)
    reused = make_environment(name)
    assert [await play(reused, seed, answers) for seed in range(8)] == first
    assert len({str(episode[0]) for episode in first}) > 3


@games
async def test_pythons_own_random_numbers_are_left_alone(name: str) -> None:
    random.seed(5)
    expected = random.Random(5).random()
    await make_environment(name).reset(0)
    assert random.random() == expected


@games
async def test_prompts_hold_no_rules(name: str) -> None:
    if name == "FrozenLake":
        rules = FrozenLakeEnv(size=3)._prompt(0, {})
    else:
        rules = SokobanEnv()._generate_player_prompt(0, {})
    sentences = [line.strip() for line in rules.splitlines() if line.strip()]
    assert len(sentences) > 5
    for history in (True, False):
        first, *later = await play(make_environment(name, {"history": history}), 0, ["[up]", "[down]", "[right]"])
        for word in ("hole", "lose", "safe", "box", "wall", "push", "target", "frozen", "puzzle", "symbol"):
            assert word not in str(first).lower()
        for step in later:
            assert not [sentence for sentence in sentences if sentence in str(step.observation)]


@games
async def test_illegal_moves_are_remarked_on_once_and_lose_in_a_row(name: str) -> None:
    environment = make_environment(name)
    observation = await environment.reset(2)
    board = last_board(observation)
    first, illegal = await environment.step("I do not know"), None
    assert not first.done
    assert "[Player] [no valid action]" in first.observation
    assert "invalid move" in first.observation
    assert last_board(first.observation) == board
    # A legal move clears the slate.
    legal = solution(board)[0]
    assert not (await environment.step(f"[{legal}]")).done or len(solution(board)) == 1
    for illegal in ("none", "up"):
        step = await environment.step(illegal)
    assert step.done
    assert step.reward < 1.0
    assert "Invalid Move" in step.observation
    with pytest.raises(EpisodeError):
        await environment.step("[up]")


async def test_walking_into_the_edge_is_illegal() -> None:
    environment = make_environment("FrozenLake")
    await environment.reset(0)
    step = await environment.step("[up]")
    assert not step.done
    assert "hit a wall" in step.observation
    assert (await environment.step("[left]")).done


async def test_falling_into_a_hole_loses_with_a_part_of_the_reward() -> None:
    for seed in range(20):
        environment = make_environment("FrozenLake")
        board = last_board(await environment.reset(seed))
        moves = [move for move, (dr, dc) in MOVES.items() if (dr, dc) in cells(board, "H")]
        if moves:
            step = await environment.step(f"[{moves[0]}]")
            assert step.done
            assert 0 < step.reward < 1.0
            return
    raise AssertionError("no board with a hole beside the start")


async def test_with_history_an_observation_stands_alone() -> None:
    with_history = await play(make_environment("FrozenLake"), 3, ["[right]", "[down]"])
    without = await play(make_environment("FrozenLake", {"history": False}), 3, ["[right]", "[down]"])
    assert with_history[0] == without[0]
    last, new = with_history[2], without[2]
    assert last.observation.count("Current Board") == 3
    assert "[Player] [right]" in last.observation
    assert new.observation.count("Current Board") == 1
    assert "[Player]" not in new.observation
    assert last_board(last.observation) == last_board(new.observation)


@pytest.mark.parametrize(
    ("answer", "move"),
    [
        ("[up]", "up"),
        ("not [left], rather [ RIGHT ] I think", "right"),
        ("<think>[w]</think> [d]", "d"),
        ("up", None),
        ("[north]", None),
        ("", None),
    ],
)
def test_the_last_bracketed_move_counts(answer: str, move: str | None) -> None:
    assert last_move(answer) == move


async def test_a_game_must_be_reset_first() -> None:
    with pytest.raises(EpisodeError):
        await make_environment("Sokoban").step("[up]")


# --- registry -------------------------------------------------------------------------------------------------------


class Echo:
    """A user's own environment."""

    def __init__(self, *, word: str) -> None:
        self.word = word

    async def reset(self, seed: int) -> str:
        return f"{self.word} {seed}"

    async def step(self, answer: str) -> Step:
        return Step(answer, 1.0, done=True)


class NoEnvironment:
    async def reset(self, seed: int) -> str:
        return ""


async def test_a_users_own_is_made_by_its_path() -> None:
    environment = make_environment("tests.unit.rollout_workers.environments.test_environments:Echo", {"word": "hello"})
    assert await environment.reset(3) == "hello 3"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Chess", {}, "known: FrozenLake, Sokoban"),
        ("no_such_module:X", {}, "cannot be imported"),
        ("tests.unit.rollout_workers.environments.test_environments:Missing", {}, "cannot be imported"),
        ("tests.unit.rollout_workers.environments.test_environments:Echo", {}, "missing a required .*it takes"),
        ("FrozenLake", {"width": 3}, "unexpected .*'width'"),
        ("tests.unit.rollout_workers.environments.test_environments:NoEnvironment", {}, "lacks"),
    ],
)
def test_what_cannot_be_made_says_why(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_environment(name, options)
