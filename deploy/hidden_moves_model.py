"""A small model that can play `deploy.hidden_moves`, and write down what a game has shown. Trained here, in minutes.

It learns two things, of all rules alike: to make a move under a list of items (any part of the rule, none at all in
some texts: then it guesses), and to look back at a game and write an item for every word that was said in it. What it
is not told is the rule of any lake: that is what its own games show it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.templates import fill
from deploy.hidden_moves import (
    RULES,
    STEPS,
    TURNS,
    WORDS,
    Square,
    beginning,
    feedback,
    items_of,
    listed,
    moved,
    observation,
    ways_to,
)
from deploy.hidden_rule import Size, byte_tokenizer, new_model
from deploy.prepare import PrepareError, whole_folder
from rollout_workers.episodes import Exchange
from rollout_workers.experience.traces import game_trace

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = {"extract_game": "{problem}\n\n{trace}\n\nWhat does each word do?", "context": "{items}"}
"""What is written into ``templates/`` beside the model: it knows no other prompts."""
SIZE = Size(hidden=64, layers=2, widening=2, initial=0.125)
LEARNED = (0.95, 0.9)
"""Shares of `knowledge` at which the model is done. Copying what the player meant to do is right in 0.45 of games."""
LEARNING_RATE, CHECK_EVERY, CHECKED = 3e-3, 25, 128
MOVES, LOOKS_BACK = 32, 8
"""Texts of each kind in a step."""
MOST_ITEMS = 6
IGNORED = -100
"""Label of a token that is not learned."""

Text = tuple[str, str]
"""(what a chat's user says, the answer)."""

_SHAPES = (
    *("- EXPERIENCE ITEM: ", "\n- EXPERIENCE ITEM: ", "- ", "\n- ", "\n\n", "\n"),
    *("G: ", "P stayed", ". G: ", ", ", " 1", " 2", " 3", "here", " and fell off"),
)
_MOVES = tuple(f"{way}: {word}" for way in STEPS for word in WORDS)
_WENT = tuple(f"P went {way}" for way in STEPS)
_TURNS = tuple(f"\n\n[Turn {turn}]\n" for turn in range(1, TURNS + 1)) + tuple(
    f"\n\n[Move {turn}]\n" for turn in range(1, TURNS + 1)
)
_END = ("\n\n[End]\n", "\n\nWhat does each word do?")
_ROLES = ("<system>", "<user>", "<assistant>")
_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def prepare_hidden_moves(folder: Path, size: Size = SIZE, *, seed: int = 0) -> bool:
    """Train the model and write it to `folder`, its prompts beside it; minutes on two cores.

    Returns False, having done nothing, where `folder` is there already.

    Raises PrepareError where the model does not learn the game.
    """
    if folder.exists():
        return False
    model, known = train(size, seed)
    if not learned(known):
        raise PrepareError(
            f"the model makes the right move in {known[0]:.0%} of texts, and looks back at {known[1]:.0%} of games "
            f"without a fault; {LEARNED[0]:.0%} and {LEARNED[1]:.0%} needed"
        )
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        make_tokenizer().save_pretrained(beside)
        (beside / "templates").mkdir()
        for name, text in PROMPTS.items():
            (beside / "templates" / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return True


# --- texts ----------------------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """Bytes, and a token for each move, way and phrase of the game."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([*_SHAPES, *_TURNS, *_END, *_MOVES, *_WENT, *WORDS, *STEPS])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_ROLES)})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def a_move(chance: random.Random, *, whole_rule: bool = False) -> Text:
    """A move under a rule of which some items are told: a good way, and the word for it."""
    rule = chance.choice(RULES)
    player, goal = beginning(chance)
    seen = observation(player, goal)
    if chance.random() < 0.5:  # not the first turn
        way = chance.choice([way for way in STEPS if moved(player, way) not in (None, goal)])
        player = moved(player, way) or player
        seen = feedback(way, player, goal)
    told = () if not whole_rule and chance.random() < 0.2 else _told(chance, rule, whole=whole_rule)
    return (f"{listed(told)}\n\n{seen}" if told else seen, _answer(rule, player, goal))


def a_look_back(chance: random.Random) -> Text:
    """A game under a rule, and the items that it shows. In half of the games most words are well chosen."""
    rule = chance.choice(RULES)
    player, goal = beginning(chance)
    slips = 1.0 if chance.random() < 0.5 else 0.2
    seen = observation(player, goal)
    exchanges: list[Exchange] = []
    went = set()
    while True:
        answer = _answer(rule, player, goal)
        if chance.random() < slips:
            answer = f"{answer.split()[0]} {chance.choice(WORDS)}"
        exchanges.append(Exchange(seen, answer))
        way = rule[answer.split()[-1]]
        went.add(way)
        after = moved(player, way)
        seen = feedback(way, after, goal)
        if after is None or after == goal or len(exchanges) == TURNS:
            break
        player = after
    seen_again = {"problem": exchanges[0].observation, "trace": game_trace(exchanges, seen)}
    items = items_of(rule, [way for way in STEPS if way in went])
    return fill(PROMPTS["extract_game"], seen_again), "\n".join(f"- EXPERIENCE ITEM: {item}" for item in items)


def _answer(rule: Mapping[str, str], player: Square, goal: Square) -> str:
    (item,) = items_of(rule, [next(iter(ways_to(player, goal)))])
    return item


def _told(chance: random.Random, rule: Mapping[str, str], *, whole: bool) -> tuple[str, ...]:
    """Items of a rule in any order, some of them more than once."""
    some = tuple(STEPS) if whole or chance.random() < 0.5 else chance.sample(list(STEPS), chance.randint(1, 3))
    ways = [*some, *chance.choices(some, k=chance.randint(0, MOST_ITEMS - len(some)))]
    chance.shuffle(ways)
    return items_of(rule, ways)


# --- the model ------------------------------------------------------------------------------------------------------


def train(size: Size, seed: int) -> tuple[Any, tuple[float, float]]:
    """The model, and what it knows at last (`knowledge`). CPU, plain AdamW, until it is good."""
    import torch

    torch.manual_seed(seed)
    tokenizer, chance = make_tokenizer(), random.Random(seed)
    model = new_model(size, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    known = (0.0, 0.0)
    for step in range(1, size.most_steps + 1):
        optimizer.zero_grad()
        for texts in ([a_move(chance) for _ in range(MOVES)], [a_look_back(chance) for _ in range(LOOKS_BACK)]):
            loss_of(model, *batch_of(tokenizer, texts)).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 or step == size.most_steps:
            known = knowledge(model, tokenizer)
            if learned(known):
                break
    return model.eval(), known


def learned(known: tuple[float, float]) -> bool:
    """Whether both shares are as high as `LEARNED`."""
    return all(share >= needed for share, needed in zip(known, LEARNED, strict=True))


def knowledge(model: Any, tokenizer: Any) -> tuple[float, float]:
    """(share of right moves under a whole rule, share of looks back without a fault), the most likely token each behind
    the right ones, on `CHECKED` texts that are always the same.
    """
    import torch

    chance = random.Random("knowledge")
    moves = [a_move(chance, whole_rule=True) for _ in range(CHECKED)]
    looks = [a_look_back(chance) for _ in range(CHECKED)]
    shares = []
    for texts in (moves, looks):
        ids, labels = batch_of(tokenizer, texts)
        with torch.no_grad():
            said, wanted = model(ids).logits[:, :-1].argmax(-1), labels[:, 1:]
        shares.append(float(((said == wanted) | (wanted == IGNORED)).all(-1).float().mean()))
    return shares[0], shares[1]


def batch_of(tokenizer: Any, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, ``[texts, tokens]`` each: chats, filled up at their end; answers are learned."""
    import torch

    rows = list(_tokens_of(tokenizer, texts))
    width = max(len(question) + len(answer) for question, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (question, answer) in enumerate(rows):
        start, end = len(question), len(question) + len(answer)
        ids[row, :end] = torch.tensor([*question, *answer])
        labels[row, start:end] = ids[row, start:end]
    return ids, labels


def _tokens_of(tokenizer: Any, texts: Sequence[Text]) -> Iterator[tuple[list[int], list[int]]]:
    questions = [f"<user>{question}<end><assistant>" for question, _ in texts]
    answers = [f"{answer}<end>" for _, answer in texts]
    encoded = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (questions, answers)]
    yield from zip(*encoded, strict=True)


def loss_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the answers' tokens, and that of all tokens on top: what is repeated in a question shows
    how to copy long before the answers do.
    """
    from torch.nn.functional import cross_entropy

    logits = model(ids).logits[:, :-1].flatten(0, 1)
    everything = ids[:, 1:].masked_fill(ids[:, 1:] == model.config.pad_token_id, IGNORED)
    return sum(
        (cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED) for wanted in (labels[:, 1:], everything)),
        start=logits.new_zeros(()),
    )
