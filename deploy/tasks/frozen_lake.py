"""The task ``frozen-lake``: a tiny model plays Frozen Lake by its context, which says what the board's letters mean.

The model is trained on the shortest safe paths of all `WORLDS`, half of the games with the line that describes their
world. Without the line it plays a mixture of the worlds, until distillation of the real world's line changes that. A
token is a whole fragment of the environment's texts, so that a game is short enough for a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.tasks.folders import PrepareError, whole_folder, write_lines
from deploy.tasks.lake_worlds import (
    MOVES,
    REAL,
    WORLDS,
    World,
    best_moves,
    boards,
    conversation,
    distances,
    fragments,
    game,
)
from deploy.tasks.small_training import Size, byte_tokenizer, fit, new_model

if TYPE_CHECKING:
    from torch import Tensor

SIZE = Size(hidden=64, layers=3, max_steps=700)
LEARNED = 0.95
"""Probability of right moves, in games with the line, that the model needs."""
OTHER_ROWS = 25
"""Rows of each other world."""
BATCH = 64
STRAY = 0.15
"""Share of random moves in the training games, so that the model learns to play on after a wrong move."""
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prepare_frozen_lake(folder: Path, size: Size = SIZE, *, seed: int = 0) -> bool:
    """Train ``model/`` and write ``context.txt`` and the rows of other worlds to `folder`; minutes on two cores.

    Returns False without changes if `folder` exists. The folder appears complete or not at all. Raises PrepareError if
    the model does not learn to play by its context.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as partial:
        model = train(size, seed)
        share = skill(model, seed, with_line=True)
        if share < LEARNED:
            raise PrepareError(f"the model plays {share:.0%} of its moves right with its context, {LEARNED:.0%} needed")
        model.save_pretrained(partial / "model")
        lake_tokenizer().save_pretrained(partial / "model")
        (partial / "context.txt").write_text(REAL.context, encoding="utf-8")
        write_lines(partial / "other_worlds.jsonl", other_rows(seed))
    return True


def lake_tokenizer() -> Any:
    """Make a tokenizer of bytes and the environment's `fragments`, with a chat template; ``<end>`` is EOS."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(fragments())
    tokenizer.add_tokens(["<user>", "<assistant>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def other_rows(seed: int) -> Iterator[dict[str, Any]]:
    """Yield turns in other worlds, which the prompts describe. One move is right, and wrong in the real world."""
    chance = random.Random(seed)
    for world in WORLDS:
        seen: set[str] = set()
        while world != REAL and len(seen) < OTHER_ROWS:
            board = chance.choice(boards())
            turns = list(game(chance, board, world, stray=STRAY))
            turn, count = turns[-1], len(turns)
            right_in_real = (
                best_moves(board, REAL, turn.player) if turn.player in distances(board, REAL) else turn.right
            )
            messages = conversation(turns, world.context)[:-1]
            if len(turn.right) > 1 or turn.right[0] in right_in_real or str(messages) in seen:
                continue
            seen.add(str(messages))
            yield {"id": f"{world}-{len(seen)}-{count}", "messages": messages, "answer": f"[{turn.right[0]}]"}


@dataclass(frozen=True, slots=True)
class Games:
    """Whole games as tokens."""

    ids: Tensor
    """``[games, tokens]``"""
    before_move: Tensor
    """``[games, tokens]``, True at the token before each move."""
    right: Tensor
    """``[moves, 4]``, the target distribution of each move: uniform over the right ones."""


def games(
    tokenizer: Any,
    chance: random.Random,
    count: int,
    *,
    with_line: bool,
    stray: float = STRAY,
    worlds: Sequence[World] = WORLDS,
) -> Games:
    """Play games on random boards in random `worlds`, with or without the line that describes the world."""
    import torch

    worlds_of = [chance.choice(worlds) for _ in range(count)]
    played = [list(game(chance, chance.choice(boards()), world, stray=stray)) for world in worlds_of]
    messages = [conversation(turns, w.context if with_line else "") for w, turns in zip(worlds_of, played, strict=True)]
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)["input_ids"]
    right = torch.tensor([[float(move in turn.right) for move in MOVES] for turns in played for turn in turns])
    before_move = ids == tokenizer.convert_tokens_to_ids("<assistant>")
    return Games(ids, before_move, right / right.sum(-1, keepdim=True))


def train(size: Size, seed: int) -> Any:
    """Train a Llama to play by the line of its prompt, and a mixture of all worlds without a line."""
    import torch

    torch.manual_seed(seed)
    chance, tokenizer = random.Random(seed), lake_tokenizer()
    model = new_model(size, tokenizer)
    return fit(
        model,
        size,
        lambda: (
            loss(model, tokenizer, games(tokenizer, chance, BATCH, with_line=with_line)) for with_line in (True, False)
        ),
    )


def loss(model: Any, tokenizer: Any, batch: Games) -> Tensor:
    """Return the cross entropy of the right moves, whichever move was made, and of ``<end>`` after each move."""
    logits = model(batch.ids).logits
    moves = logits[batch.before_move].log_softmax(-1)[:, _moves(tokenizer)]
    ends = logits[batch.before_move.roll(1, dims=1)].log_softmax(-1)[:, tokenizer.eos_token_id]
    return -(batch.right * moves).sum(-1).mean() - ends.mean()


def skill(model: Any, seed: int, *, with_line: bool, worlds: Sequence[World] = WORLDS, count: int = 500) -> float:
    """Return the model's mean probability of right moves, in games without wrong moves."""
    import torch

    tokenizer = lake_tokenizer()
    batch = games(tokenizer, random.Random(seed + 1), count, with_line=with_line, stray=0.0, worlds=worlds)
    with torch.no_grad():
        moves = model(batch.ids).logits[batch.before_move].softmax(-1)[:, _moves(tokenizer)]
    return float(moves[batch.right > 0].sum() / len(moves))


def _moves(tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"[{move}]") for move in MOVES]
