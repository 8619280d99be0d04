"""Frozen Lake in small: its texts are the environment's, its moves are right, a model is made of it, or nothing is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.loader import load_config
from common.data.rendering import Renderer
from common.data.rows import read_rows
from common.protocol.schema import Ids, as_ids
from deploy.tasks import frozen_lake
from deploy.tasks.folders import PrepareError, write_lines
from deploy.tasks.frozen_lake import (
    OTHER_ROWS,
    games,
    lake_tokenizer,
    loss,
    other_rows,
    prepare_frozen_lake,
    skill,
    train,
)
from deploy.tasks.lake_worlds import (
    HOLES,
    INTRODUCTION,
    MAX_TURNS,
    MOVES,
    NO_MOVE,
    REAL,
    START,
    WORLDS,
    Board,
    World,
    best_moves,
    board_text,
    boards,
    conversation,
    distances,
    feedback,
    game,
    next_cell,
)
from deploy.tasks.small_training import Size
from learner.data.games import environment_error
from rollout_workers.engine.engine import Generation
from rollout_workers.environments.episodes import play_episode
from rollout_workers.environments.registry import make_environment
from rollout_workers.environments.text_games import last_move
from tests.support.paths import ROOT

CONFIG = ROOT / "deploy/configs/frozen_lake_small.yaml"
TINY = Size(hidden=32, layers=1, max_steps=3)


class Player:
    """Answers as `choose` says, and keeps the prompts that it was given."""

    def __init__(self, tokenizer: object, choose: Callable[[int], str]) -> None:
        self.tokenizer, self.choose, self.prompts = tokenizer, choose, []

    async def __call__(self, prompt_ids: Ids, turn: int) -> Generation:
        self.prompts.append(self.tokenizer.decode(prompt_ids.tolist()))
        ids = as_ids(self.tokenizer(f"[{self.choose(turn)}]<end>")["input_ids"])
        nothing = np.zeros(len(ids), dtype=np.float32)
        return Generation(ids, nothing, as_ids(np.zeros((len(ids), 1))), "stop", ((0, 0),))


def board_of(observation: str) -> Board:
    """The board of a first observation: P stands on the start."""
    rows = [line.strip("|").split("|") for line in observation.splitlines() if line.startswith("|")]
    return tuple("".join(cell.strip().replace("P", "") or " " for cell in row) for row in rows)


@pytest.mark.parametrize("holes", HOLES)
async def test_the_texts_are_the_environments(holes: int) -> None:
    """Over games of moves at random, refused ones too: byte for byte, and every board is one of ours."""
    chance = random.Random(holes)
    said = set()
    for seed in range(300):
        environment = make_environment("FrozenLake", {"size": 3, "holes": holes, "history": False})
        observation, player, ahead = await environment.reset(seed), START, INTRODUCTION
        board = board_of(observation)
        assert board in boards()
        for _ in range(3 * MAX_TURNS):
            assert observation == ahead + board_text(board, player)
            move = chance.choice([*MOVES, NO_MOVE])
            step = await environment.step(f"[{move}]")
            if step.done:
                break
            where = next_cell(player, move)
            observation, player, ahead = step.observation, where or player, feedback(move, where)
            said.add(ahead)
    assert {feedback(move, None) for move in (*MOVES, NO_MOVE)} < said
    assert last_move(f"[{NO_MOVE}]") is None


def test_the_boards_do_not_tell_the_world() -> None:
    """All worlds share the few boards, as the configuration says about its splits."""
    counts = [sum(row.count("H") for row in board) for board in boards()]
    assert [counts.count(count) for count in HOLES] == [7, 19, 18]
    assert len(set(boards())) == len(boards())
    assert all(START in distances(board, world) for board in boards() for world in WORLDS)
    assert max(distances(board, REAL)[START] for board in boards()) < MAX_TURNS


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_right_moves_are_the_safe_ones_that_come_nearer(world: World) -> None:
    """By walking: wherever the right moves lead, the goal is reached, on no hole, as soon as no other walk does."""
    for board in boards():
        reached = {START}
        for _ in range(distances(board, world)[START]):
            assert all(board[r][c] != world.goal for r, c in reached)
            reached = {next_cell(cell, move) for cell in reached for move in best_moves(board, world, cell)} - {None}
            assert not any(world.deadly and board[r][c] == world.other for r, c in reached)
        assert {board[r][c] for r, c in reached} == {world.goal}
    assert best_moves((" H ", " H ", "  G"), REAL, START) == ("down",)


def test_worlds_differ_in_what_they_say_and_in_what_is_right() -> None:
    assert len({world.context for world in WORLDS}) == len(WORLDS) == 4
    assert REAL.context == "G is the goal, H is a hole."
    board = ("  H", " H ", "  G")
    assert [best_moves(board, world, (1, 0)) for world in WORLDS] == [
        ("down",),
        ("down", "right"),
        ("right",),
        ("right",),
    ]


def test_a_game_ends_at_the_goal_or_in_a_hole() -> None:
    chance = random.Random(0)
    for _ in range(300):
        board, world = chance.choice(boards()), chance.choice(WORLDS)
        turns = list(game(chance, board, world, stray=0.5))
        assert 1 <= len(turns) <= MAX_TURNS
        assert turns[0].player == START
        assert all(turn.right == best_moves(board, world, turn.player) for turn in turns)
        refused = [next_cell(turn.player, turn.move) is None for turn in turns]
        assert not any(one and following for one, following in itertools.pairwise(refused))
        safe = list(game(chance, board, world, stray=0.0))
        assert len(safe) == distances(board, world)[START]


@pytest.mark.parametrize("in_context", [True, False])
async def test_a_rollout_shows_what_the_model_was_trained_on(
    in_context: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last prompt of a game under the configuration is a training text up to its last answer, token by token."""
    monkeypatch.chdir(ROOT)
    config = load_config(CONFIG)
    lake_tokenizer().save_pretrained(tmp_path)
    tokenizer = lake_tokenizer()
    chance = random.Random(3)
    row = read_rows(config.data.train)[0]
    environment = make_environment(str(row.environment), row.options)
    board = board_of(await environment.reset(row.seed))
    turns = next(
        turns
        for turns in (list(game(chance, board, REAL, stray=0.3)) for _ in range(100))
        if len(turns) > 3 and NO_MOVE in [turn.move for turn in turns[:-1]]
    )
    player = Player(tokenizer, lambda turn: turns[turn].move)
    renderer = Renderer(tokenizer, REAL.context, config.student, config.context.placement)
    await play_episode(
        environment,
        row.seed,
        player,
        renderer,
        episode_id="g",
        max_turns=len(turns),
        samples=config.environment.sample_format,
        in_context=in_context,
    )
    messages = conversation(turns, REAL.context if in_context else "")
    trained = tokenizer.apply_chat_template(messages, tokenize=False)
    assert player.prompts[-1] == trained.removesuffix(f"[{turns[-1].move}]<end>")
    assert config.environment.max_turns == MAX_TURNS


def test_a_piece_of_text_is_a_token_and_read_back() -> None:
    tokenizer = lake_tokenizer()
    batch = games(tokenizer, random.Random(0), 100, with_line=True)
    for ids in batch.ids:
        text = tokenizer.decode(ids)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    bytes_used = {tokenizer.convert_ids_to_tokens(i) for i in batch.ids.flatten().tolist() if i < 256}
    assert bytes_used == {",", ".", "Ġ", "Ċ"}
    assert batch.ids.shape[1] < 128
    assert tokenizer.decode(tokenizer("[down]<end>")["input_ids"], skip_special_tokens=True) == "[down]"


def test_what_is_learned_are_the_right_moves_and_the_end() -> None:
    tokenizer = lake_tokenizer()
    batch = games(tokenizer, random.Random(0), 50, with_line=False, stray=0.0)
    answers = [tokenizer.decode(i) for i in batch.ids[batch.before_move.roll(1, dims=1)]]
    assert len(answers) == len(batch.right)
    for answer, right in zip(answers, batch.right.tolist(), strict=True):
        assert right[list(MOVES).index(answer.strip("[]"))] > 0
        assert sum(right) == pytest.approx(1)
    assert set(tokenizer.batch_decode([[i] for i in batch.ids[batch.before_move.roll(2, dims=1)].tolist()])) == {
        "<end>"
    }
    assert "goal," not in "".join(tokenizer.batch_decode(batch.ids))


def test_other_worlds_ask_for_what_is_wrong_in_the_real_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "other.jsonl", other_rows(0))
    rows = read_rows(tmp_path / "other.jsonl", need_answers=True)
    assert len(rows) == 3 * OTHER_ROWS
    assert len({str(row.messages) for row in rows}) == len(rows)
    for row in rows:
        assert row.messages is not None
        first, last = row.messages[0], row.messages[-1]
        assert first.role == last.role == "user"
        assert last_move(str(row.answer)) in MOVES
        assert any(first.content.startswith(f"{world.context}\n\n") for world in WORLDS if world != REAL)
    for world in WORLDS:
        assert sum(row.id.startswith(f"{world}-") for row in rows) == (OTHER_ROWS if world != REAL else 0)


def test_the_configuration_is_of_games_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are apart, and the lakes that are asked about at the end are none of those that are trained on."""
    monkeypatch.chdir(ROOT)
    config = load_config(CONFIG)
    rows = {name: read_rows(getattr(config.data, name)) for name in ("train", "valid", "eval")}
    assert {name: len(found) for name, found in rows.items()} == {"train": 640, "valid": 64, "eval": 128}
    seeds = [row.seed for found in rows.values() for row in found]
    assert len(set(seeds)) == len(seeds)
    assert [environment_error(found[0]) for found in rows.values()] == [None] * 3
    assert [rows[name][0].options["holes"] for name in rows] == [2, 2, 3]
    folder = Path("models/frozen-lake")
    assert config.context.file == folder / "context.txt"
    assert Path(config.student.model) == folder / "model"
    assert list(config.eval.ood.values()) == [folder / "other_worlds.jsonl"]


def test_training_lowers_the_loss_and_is_the_same_every_time() -> None:
    tokenizer = lake_tokenizer()
    batch = games(tokenizer, random.Random(5), 32, with_line=True)

    def loss_after(steps: int) -> float:
        model = train(Size(hidden=32, layers=1, max_steps=steps), 0)
        with torch.no_grad():
            return float(loss(model, tokenizer, batch))

    first, again, fresh = loss_after(12), loss_after(12), loss_after(1)
    assert first == again
    assert first < fresh - 0.5


def test_skill_is_the_probability_of_right_moves() -> None:
    class Uniform(torch.nn.Module):
        """Every token is as likely."""

        def forward(self, ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": torch.zeros(*ids.shape, len(lake_tokenizer()))})

    assert 0 < skill(Uniform(), 0, with_line=True, count=20) < 2 / len(lake_tokenizer())


def test_a_model_that_did_not_learn_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"plays \d+% of its moves right with its context, 95% needed"):
        prepare_frozen_lake(tmp_path / "models/lake", TINY)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_model_and_the_rows_appear_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(frozen_lake, "LEARNED", 0.0)
    folder = tmp_path / "lake"
    assert prepare_frozen_lake(folder, TINY)
    assert {path.name for path in folder.iterdir()} == {"model", "context.txt", "other_worlds.jsonl"}
    assert (folder / "context.txt").read_text() == REAL.context
    AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not prepare_frozen_lake(folder, TINY)
