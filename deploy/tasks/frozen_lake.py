"""A tiny model, made from nothing, that plays Frozen Lake by what its context says the letters on the board mean.

It is trained on the shortest safe ways of all `WORLDS`, half of the games with the line that names their world. Without
the line it plays as in any of them: what distillation of the real world's line is to change. A token is a whole piece
of what the environment says, so that a game is short enough for a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.tasks.gguf import PrepareError, whole_folder
from deploy.tasks.hidden_rule import Size, byte_tokenizer, new_model, write_lines
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
from deploy.tasks.small_training import fit

if TYPE_CHECKING:
    from torch import Tensor

SIZE = Size(hidden=64, layers=3, most_steps=700)
LEARNED = 0.95
"""Of the probability, the share on right moves, in games with the line that names their world."""
OTHER_ROWS = 25
"""Turns of each other world whose next move is asked for."""
BATCH = 64
STRAY = 0.15
"""Share of moves in the games that are made at random: the model learns what is right after wrong ones, too."""
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prepare_frozen_lake(folder: Path, size: Size = SIZE, *, seed: int = 0) -> bool:
    """Train ``model/``, and write beside it ``context.txt`` and the rows of other worlds; minutes on two cores.

    Returns False, having done nothing, where `folder` is there already. It appears whole or not at all.
    Raises PrepareError where the model does not learn to play by its context.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as beside:
        model = train(size, seed)
        found = skill(model, seed, told=True)
        if found < LEARNED:
            raise PrepareError(
                f"the model plays {found:.0%} of its moves right in the worlds it is told of, {LEARNED:.0%} needed"
            )
        model.save_pretrained(beside / "model")
        lake_tokenizer().save_pretrained(beside / "model")
        (beside / "context.txt").write_text(REAL.context, encoding="utf-8")
        write_lines(beside / "other_worlds.jsonl", other_rows(seed))
    return True


def lake_tokenizer() -> Any:
    """Bytes, and one token for each of the environment's `fragments`; a chat template; ``<end>`` ends an answer."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(fragments())
    tokenizer.add_tokens(["<user>", "<assistant>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def other_rows(seed: int) -> Iterator[dict[str, Any]]:
    """Games under way in other worlds, which their prompts name: one move is right, and in the real world it is not."""
    chance = random.Random(seed)
    for world in WORLDS:
        seen: set[str] = set()
        while world != REAL and len(seen) < OTHER_ROWS:
            board = chance.choice(boards())
            turns = list(game(chance, board, world, stray=STRAY))
            turn, count = turns[-1], len(turns)
            really = best_moves(board, REAL, turn.player) if turn.player in distances(board, REAL) else turn.right
            messages = conversation(turns, world.context)[:-1]
            if len(turn.right) > 1 or turn.right[0] in really or str(messages) in seen:
                continue
            seen.add(str(messages))
            yield {"id": f"{world}-{len(seen)}-{count}", "messages": messages, "answer": f"[{turn.right[0]}]"}


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Games:
    """Whole games as tokens, ``[games, tokens]``; `asked` marks those that a move follows. Of all moves in order,
    ``[moves, 4]``: how the right ones share the probability.
    """

    ids: Tensor
    asked: Tensor
    right: Tensor


def games(
    tokenizer: Any,
    chance: random.Random,
    count: int,
    *,
    told: bool,
    stray: float = STRAY,
    worlds: Sequence[World] = WORLDS,
) -> Games:
    """Games on any board in any of `worlds`; `told`, with the line that names it ahead of them."""
    import torch

    worlds_of = [chance.choice(worlds) for _ in range(count)]
    played = [list(game(chance, chance.choice(boards()), world, stray=stray)) for world in worlds_of]
    messages = [conversation(turns, w.context if told else "") for w, turns in zip(worlds_of, played, strict=True)]
    texts = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)["input_ids"]
    right = torch.tensor([[float(move in turn.right) for move in MOVES] for turns in played for turn in turns])
    asked = ids == tokenizer.convert_tokens_to_ids("<assistant>")
    return Games(ids, asked, right / right.sum(-1, keepdim=True))


def train(size: Size, seed: int) -> Any:
    """A Llama that plays by the line it is told, and a mixture of all worlds without one. CPU, plain AdamW."""
    import torch

    torch.manual_seed(seed)
    chance, tokenizer = random.Random(seed), lake_tokenizer()
    model = new_model(size, tokenizer)
    return fit(
        model,
        size,
        lambda: (loss(model, tokenizer, games(tokenizer, chance, BATCH, told=told)) for told in (True, False)),
    )


def loss(model: Any, tokenizer: Any, batch: Games) -> Tensor:
    """Cross entropy of the right moves, whichever was made, and of the end behind each."""
    logits = model(batch.ids).logits
    moves = logits[batch.asked].log_softmax(-1)[:, _moves(tokenizer)]
    ends = logits[batch.asked.roll(1, dims=1)].log_softmax(-1)[:, tokenizer.eos_token_id]
    return -(batch.right * moves).sum(-1).mean() - ends.mean()


def skill(model: Any, seed: int, *, told: bool, worlds: Sequence[World] = WORLDS, count: int = 500) -> float:
    """Share of the probability that is on right moves, in games without a wrong one."""
    import torch

    tokenizer = lake_tokenizer()
    batch = games(tokenizer, random.Random(seed + 1), count, told=told, stray=0.0, worlds=worlds)
    with torch.no_grad():
        moves = model(batch.ids).logits[batch.asked].softmax(-1)[:, _moves(tokenizer)]
    return float(moves[batch.right > 0].sum() / len(moves))


def _moves(tokenizer: Any) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"[{move}]") for move in MOVES]
