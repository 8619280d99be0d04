"""A small task made from nothing, whose experience a tiny model can write itself: which of four digits is it?

``a4b8c1d5=8`` follows the rule ``b``: the answer is the digit behind that letter. A model is trained here under four
rules at once, so that none of them is what it does by itself. It learns to follow the rule of solved examples ahead of
a question; to name, asked ``Why?``, a rule that fits what it has solved; and to follow the rule that most lines of a
context name. Tokens are bytes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.tasks.gguf import PrepareError, whole_folder
from deploy.tasks.hidden_rule import Size, byte_tokenizer, new_model, write_lines
from deploy.tasks.small_training import fit

if TYPE_CHECKING:
    from torch import Tensor

Digits = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """The answer is the digit at `place` (from 0), behind that place's letter."""

    place: int

    def __str__(self) -> str:
        return LETTERS[self.place]

    def answer(self, digits: Digits) -> int:
        """What is right."""
        return digits[self.place]


LETTERS = "abcd"
LENGTH = len(LETTERS)
"""Digits of a question, all different."""
RULES = tuple(Rule(place) for place in range(LENGTH))
DISTILLED = Rule(1)
EXAMPLES = (0, 1, 2, 3)
"""Solved examples ahead of a training row's question: as many rows have none as have three."""
SPLITS = {"train": 160, "valid": 60, "eval": 150}
"""Rows. No question of one is a question, or an example, of another."""
NUMBERS = 2000
"""Different questions in all, those of examples counted in."""
MOST_ITEMS, MOST_EXAMPLES = 10, 4
"""Lines of a context, and solved questions, that the model is trained with."""
SIZE = Size(hidden=64, layers=4, most_steps=1500)
LEARNED = {"given": 0.95, "inferred": 0.8, "named": 0.8}
"""Shares of right answers at which the model is good: see `skills`."""
BATCH = 32


def prepare_experience_rule(folder: Path, size: Size = SIZE, *, seed: int = 0) -> bool:
    """Train ``model/`` and write its rows beside it; minutes on two cores.

    Returns False, having done nothing, where `folder` is there already. It appears whole or not at all.
    Raises PrepareError where the model does not learn what it should.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as beside:
        model = train(size, seed)
        found = skills(model, seed)
        lacking = [f"{name} {found[name]:.0%} ({needed:.0%} needed)" for name, needed in LEARNED.items()]
        if any(found[name] < needed for name, needed in LEARNED.items()):
            raise PrepareError(f"the model did not learn its task, right answers: {', '.join(lacking)}")
        model.save_pretrained(beside / "model")
        byte_tokenizer().save_pretrained(beside / "model")
        write_rows(beside, seed)
    return True


# --- texts ----------------------------------------------------------------------------------------------------------


def question(digits: Digits) -> str:
    """What is asked."""
    return "".join(f"{letter}{digit}" for letter, digit in zip(LETTERS, digits, strict=True)) + "="


def solved(rule: Rule, asked: Sequence[Digits]) -> str:
    """Questions with their answers, a line each."""
    return "".join(f"{question(digits)}{rule.answer(digits)}\n" for digits in asked)


def context_of(rules: Sequence[Rule]) -> str:
    """What the teacher sees ahead of a prompt: as `opcd experience accumulate` makes it of items that name `rules`."""
    return "".join(f"- {rule}\n" for rule in rules) + "\n"


def looked_back(rule: Rule) -> str:
    """What is asked about an attempt, and the answer. The prompt is ``deploy/configs/experience_small/extract.txt``."""
    return f"Why?\n- EXPERIENCE ITEM: {rule}<end>"


def write_rows(folder: Path, seed: int) -> None:
    """``given.txt``, the rows of `SPLITS` (those of training know no answer), and ``other_rules.jsonl``: prompts
    with three examples of another rule.
    """
    chance = random.Random(seed)
    numbers = chance.sample(list(itertools.permutations(range(10), LENGTH)), NUMBERS)
    (folder / "given.txt").write_text(context_of([DISTILLED]), encoding="utf-8")
    for name in ("valid", "eval"):
        taken, numbers = numbers[: SPLITS[name]], numbers[SPLITS[name] :]
        write_lines(folder / f"{name}.jsonl", (_row(DISTILLED, (), digits) for digits in taken))
    taken, numbers = numbers[: SPLITS["train"]], numbers[SPLITS["train"] :]
    rows = [
        _row(DISTILLED, chance.sample(numbers, EXAMPLES[i % len(EXAMPLES)]), digits) for i, digits in enumerate(taken)
    ]
    write_lines(folder / "train.jsonl", ({"id": row["id"], "prompt": row["prompt"]} for row in rows))
    others = [rule for rule in RULES if rule != DISTILLED] * 25
    write_lines(
        folder / "other_rules.jsonl",
        (_row(rule, chance.sample(numbers, 3), digits) for rule, digits in zip(others, numbers, strict=False)),
    )


def _row(rule: Rule, examples: Sequence[Digits], digits: Digits) -> dict[str, str]:
    name = "".join(map(str, digits))
    return {
        "id": f"{rule}-{len(examples)}-{name}",
        "prompt": solved(rule, examples) + question(digits),
        "answer": str(rule.answer(digits)),
    }


# --- model ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one shape as tokens, ``[texts, tokens]``, and where in them the tokens stand that are learned."""

    ids: Tensor
    learned: Sequence[int]


def texts(chance: random.Random, count: int, *, items: int, examples: int, looking_back: bool) -> Texts:
    """`count` texts: a context of `items` lines, most of which name the text's rule, none where `items` is 0; so many
    solved examples, whose answers are learned; and, `looking_back`, the rule's name behind them.
    """
    import torch

    lines = []
    for _ in range(count):
        rule = chance.choice(RULES)
        wrong = chance.randint(0, max(items - 1, 0) // 2)
        named = [rule] * (items - wrong) + [chance.choice(RULES) for _ in range(wrong)]
        chance.shuffle(named)
        asked = [tuple(chance.sample(range(10), LENGTH)) for _ in range(examples)]
        lines.append((context_of(named) if items else "") + solved(rule, asked) + looked_back(rule) * looking_back)
    ids = torch.tensor(byte_tokenizer()(lines)["input_ids"])
    start = len(context_of([DISTILLED] * items)) if items else 0
    line = len(solved(DISTILLED, [(0,) * LENGTH]))
    learned = [start + line * (i + 1) - behind for i in range(examples) for behind in (2, 1)]  # the digit, the line end
    if looking_back:
        learned += range(start + line * examples + len("Why?\n"), ids.shape[1])
    return Texts(ids, learned)


def train(size: Size, seed: int) -> Any:
    """A Llama that follows what it is told, follows examples, and names what it follows. CPU, plain AdamW."""
    import torch

    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = new_model(size)
    return fit(model, size, lambda: (loss(model, batch) for batch in _batches(chance)))


def loss(model: Any, batch: Texts) -> Tensor:
    """Cross entropy of a text's learned tokens, summed over them: those that are always the same soon cost nothing."""
    from torch.nn.functional import cross_entropy

    at = [place - 1 for place in batch.learned]
    logits = model(batch.ids).logits[:, at]
    return cross_entropy(logits.flatten(0, 1), batch.ids[:, batch.learned].flatten()) * len(at)


def skills(model: Any, seed: int, *, count: int = 500) -> dict[str, float]:
    """Shares of right answers, the likeliest token each: without anything (`guessed`), under a context of five lines
    of which three or more are right (`given`), behind three examples (`inferred`), of names for four (`named`).
    """
    import torch

    chance = random.Random(seed + 1)
    bare = texts(chance, count, items=0, examples=MOST_EXAMPLES, looking_back=True)
    told = texts(chance, count, items=5, examples=1, looking_back=False)
    with torch.no_grad():
        right, right_told = (
            (model(batch.ids).logits[:, :-1].argmax(-1) == batch.ids[:, 1:]).float() for batch in (bare, told)
        )
    answers = [place - 1 for place in bare.learned[: 2 * MOST_EXAMPLES : 2]]
    return {
        "guessed": float(right[:, answers[0]].mean()),
        "given": float(right_told[:, told.learned[0] - 1].mean()),
        "inferred": float(right[:, answers[3]].mean()),
        "named": float(right[:, [place - 1 for place in bare.learned[2 * MOST_EXAMPLES :]]].prod(-1).mean()),
    }


def _batches(chance: random.Random) -> Iterator[Texts]:
    """What one step learns from: texts with a context, and texts without one that are looked back at."""
    items, told, solved_ = chance.randint(1, MOST_ITEMS), chance.randint(1, 3), chance.choice((1, 1, 2, MOST_EXAMPLES))
    yield texts(chance, BATCH, items=items, examples=told, looking_back=False)
    yield texts(chance, BATCH, items=0, examples=solved_, looking_back=True)
    yield primer(chance, 2 * BATCH)


def primer(chance: random.Random, count: int) -> Texts:
    """Texts ``a4b8c1d5:8b``, a digit and whose it is: nothing is asked like this, but what it takes is part of the
    longer way to a rule's name, which is not found in reasonable time without.
    """
    import torch

    lines = []
    for _ in range(count):
        rule, digits = chance.choice(RULES), tuple(chance.sample(range(10), LENGTH))
        lines.append(f"{question(digits)[:-1]}:{rule.answer(digits)}{rule}")
    ids = torch.tensor(byte_tokenizer()(lines)["input_ids"])
    return Texts(ids, [ids.shape[1] - 1])
