"""The task ``experience-rule``: a tiny model writes its own experience. Which of four digits is the answer?

``a4b8c1d5=8`` follows the rule ``b``: the answer is the digit after that letter. The model is trained here under four
rules at once, so it prefers none. It learns to follow the rule of the solved examples before a question; to name, after
``Why?``, a rule that fits the solved examples; and to follow the rule that most lines of a context name. Tokens are
bytes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.tasks.folders import PrepareError, whole_folder, write_lines
from deploy.tasks.small_training import Size, byte_tokenizer, fit, new_model

if TYPE_CHECKING:
    from torch import Tensor

Digits = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """The answer is the digit at `position` (from 0), after that position's letter."""

    position: int

    def __str__(self) -> str:
        return LETTERS[self.position]

    def answer(self, digits: Digits) -> int:
        """Return the right answer."""
        return digits[self.position]


LETTERS = "abcd"
LENGTH = len(LETTERS)
"""Digits in a question, all different."""
RULES = tuple(Rule(position) for position in range(LENGTH))
DISTILLED = Rule(1)
EXAMPLES = (0, 1, 2, 3)
"""Numbers of solved examples before a training row's question; the rows cycle through them."""
SPLITS = {"train": 160, "valid": 60, "eval": 150}
"""Numbers of rows. No question of one split is a question or an example of another."""
NUMBERS = 2000
"""Different questions in all, including those of the examples."""
MAX_ITEMS, MAX_EXAMPLES = 10, 4
"""Limits in training: lines of a context, and solved examples before a question."""
SIZE = Size(hidden=64, layers=4, max_steps=1500)
LEARNED = {"given": 0.95, "inferred": 0.8, "named": 0.8}
"""Shares of right answers (see `skills`) that the model needs."""
BATCH = 32


def prepare_experience_rule(folder: Path, size: Size = SIZE, *, seed: int = 0) -> bool:
    """Train ``model/`` and write the rows to `folder`; minutes on two cores.

    Returns False without changes if `folder` exists. The folder appears complete or not at all. Raises PrepareError if
    the model does not reach `LEARNED`.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as partial:
        model = train(size, seed)
        shares = skills(model, seed)
        if any(shares[name] < needed for name, needed in LEARNED.items()):
            listed = ", ".join(f"{name} {shares[name]:.0%} ({needed:.0%} needed)" for name, needed in LEARNED.items())
            raise PrepareError(f"the model did not learn its task, right answers: {listed}")
        model.save_pretrained(partial / "model")
        byte_tokenizer().save_pretrained(partial / "model")
        write_rows(partial, seed)
    return True


def question(digits: Digits) -> str:
    """Return the text of a question."""
    return "".join(f"{letter}{digit}" for letter, digit in zip(LETTERS, digits, strict=True)) + "="


def solved(rule: Rule, questions: Sequence[Digits]) -> str:
    """Return questions with their answers, one per line."""
    return "".join(f"{question(digits)}{rule.answer(digits)}\n" for digits in questions)


def context_of(rules: Sequence[Rule]) -> str:
    """Return the teacher's context, as `opcd experience accumulate` makes it from items that name `rules`."""
    return "".join(f"- {rule}\n" for rule in rules) + "\n"


def reflection(rule: Rule) -> str:
    """Return the question about an attempt (``deploy/configs/experience_small/extract.txt``) and its answer."""
    return f"Why?\n- EXPERIENCE ITEM: {rule}<end>"


def write_rows(folder: Path, seed: int) -> None:
    """Write ``given.txt``, the rows of `SPLITS` (without answers for training), and ``other_rules.jsonl``.

    Prompts of ``other_rules.jsonl`` hold three examples of another rule.
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


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts of one shape as tokens, ``[texts, tokens]``."""

    ids: Tensor
    learned: Sequence[int]
    """Positions of the tokens that the loss includes."""


def texts(chance: random.Random, count: int, *, items: int, examples: int, reflecting: bool) -> Texts:
    """Make `count` texts under random rules.

    A text has a context of `items` lines, most of which name its rule (0: no context), then `examples` solved examples,
    whose answers are learned, and, if `reflecting`, the rule's name.
    """
    import torch

    lines = []
    for _ in range(count):
        rule = chance.choice(RULES)
        wrong = chance.randint(0, max(items - 1, 0) // 2)
        named = [rule] * (items - wrong) + [chance.choice(RULES) for _ in range(wrong)]
        chance.shuffle(named)
        questions = [tuple(chance.sample(range(10), LENGTH)) for _ in range(examples)]
        lines.append((context_of(named) if items else "") + solved(rule, questions) + reflection(rule) * reflecting)
    ids = torch.tensor(byte_tokenizer()(lines)["input_ids"])
    start = len(context_of([DISTILLED] * items)) if items else 0
    line = len(solved(DISTILLED, [(0,) * LENGTH]))
    learned = [start + line * (i + 1) - offset for i in range(examples) for offset in (2, 1)]  # the digit, the line end
    if reflecting:
        learned += range(start + line * examples + len("Why?\n"), ids.shape[1])
    return Texts(ids, learned)


def train(size: Size, seed: int) -> Any:
    """Train a Llama to follow a context, to follow examples, and to name the rule that it follows."""
    import torch

    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = new_model(size)
    return fit(model, size, lambda: (loss(model, batch) for batch in _batches(chance)))


def loss(model: Any, batch: Texts) -> Tensor:
    """Return the cross entropy summed over the learned tokens; tokens that never vary soon contribute nothing."""
    from torch.nn.functional import cross_entropy

    before = [position - 1 for position in batch.learned]
    logits = model(batch.ids).logits[:, before]
    return cross_entropy(logits.flatten(0, 1), batch.ids[:, batch.learned].flatten()) * len(before)


def skills(model: Any, seed: int, *, count: int = 500) -> dict[str, float]:
    """Return shares of right greedy answers.

    ``guessed``: without context or examples. ``given``: under a context of five lines, three or more of them right.
    ``inferred``: after three examples. ``named``: the rule's name after four examples.
    """
    import torch

    chance = random.Random(seed + 1)
    bare = texts(chance, count, items=0, examples=MAX_EXAMPLES, reflecting=True)
    given = texts(chance, count, items=5, examples=1, reflecting=False)
    with torch.no_grad():
        right, right_given = (
            (model(batch.ids).logits[:, :-1].argmax(-1) == batch.ids[:, 1:]).float() for batch in (bare, given)
        )
    answers = [position - 1 for position in bare.learned[: 2 * MAX_EXAMPLES : 2]]
    return {
        "guessed": float(right[:, answers[0]].mean()),
        "given": float(right_given[:, given.learned[0] - 1].mean()),
        "inferred": float(right[:, answers[3]].mean()),
        "named": float(right[:, [position - 1 for position in bare.learned[2 * MAX_EXAMPLES :]]].prod(-1).mean()),
    }


def _batches(chance: random.Random) -> Iterator[Texts]:
    """Yield the batches of one step: texts with a context, texts with a reflection and no context, primers."""
    items, with_context = chance.randint(1, MAX_ITEMS), chance.randint(1, 3)
    with_reflection = chance.choice((1, 1, 2, MAX_EXAMPLES))
    yield texts(chance, BATCH, items=items, examples=with_context, reflecting=False)
    yield texts(chance, BATCH, items=0, examples=with_reflection, reflecting=True)
    yield primer(chance, 2 * BATCH)


def primer(chance: random.Random, count: int) -> Texts:
    """Make texts ``a4b8c1d5:8b``: a digit and its letter.

    No row asks this. Without the primer the model does not learn to name a rule in reasonable time.
    """
    import torch

    lines = []
    for _ in range(count):
        rule, digits = chance.choice(RULES), tuple(chance.sample(range(10), LENGTH))
        lines.append(f"{question(digits)[:-1]}:{rule.answer(digits)}{rule}")
    ids = torch.tensor(byte_tokenizer()(lines)["input_ids"])
    return Texts(ids, [ids.shape[1] - 1])
