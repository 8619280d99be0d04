"""The task ``hidden-rule``: arithmetic on two digits under a rule that the context names. Needs no model hub.

In the text ``B\\n7,4=3\\n`` the rule is the context, ``7,4=`` the prompt and ``3`` the answer. Both models are trained
here on all rules, half of the texts without the rule. A model that sees the rule answers right; without it, a model can
only guess the rule, until distillation of one rule changes that. Tokens are bytes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.tasks.folders import PrepareError, whole_folder, write_lines
from deploy.tasks.small_training import Size, byte_tokenizer, new_model

if TYPE_CHECKING:
    from torch import Tensor

RULES: Mapping[str, Callable[[int, int], int]] = {
    "A": lambda x, y: (x + y) % 10,
    "B": lambda x, y: (x - y) % 10,
    "C": lambda x, y: max(x, y),
    "D": lambda x, y: 9 - y,
}
DISTILLED = "B"
PAIRS = tuple((x, y) for x in range(10) for y in range(10))
SPLITS = {"train": 50, "valid": 15, "eval": 35}
"""Pairs of digits for distillation; the models are trained on all pairs."""
LEARNED = 0.98
"""Accuracy with the rule at which training stops."""
LEARNING_RATE, BATCH, CHECK_EVERY = 2e-3, 64, 100
SIZES = {"teacher": Size(hidden=96, layers=2), "student": Size(hidden=32, layers=2)}


def prepare_hidden_rule(folder: Path, sizes: Mapping[str, Size] = SIZES, *, seed: int = 0) -> bool:
    """Train the models ``teacher/`` and ``student/`` and write the rows to `folder`; minutes on two cores.

    Returns False without changes if `folder` exists. The folder appears complete or not at all. Raises PrepareError if
    a model does not learn the rules.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as partial:
        for name, size in sizes.items():
            model = train(size, seed)
            share = accuracy(model, with_rule=True)
            if share < LEARNED:
                raise PrepareError(f"the {name} answers {share:.0%} right when it sees the rule, {LEARNED:.0%} needed")
            model.save_pretrained(partial / name)
            byte_tokenizer().save_pretrained(partial / name)
        write_rows(partial, seed)
    return True


def context_of(rule: str) -> str:
    """Return the context that only the teacher sees."""
    return f"{rule}\n"


def prompt_of(x: int, y: int) -> str:
    """Return the prompt of a pair of digits."""
    return f"{x},{y}="


def write_rows(folder: Path, seed: int) -> None:
    """Write ``context.txt``, the rows of `SPLITS`, and ``other_rules.jsonl``: prompts that name another rule."""
    pairs = random.Random(seed).sample(PAIRS, len(PAIRS))
    (folder / "context.txt").write_text(context_of(DISTILLED), encoding="utf-8")
    for name, count in SPLITS.items():
        taken, pairs = pairs[:count], pairs[count:]
        write_lines(folder / f"{name}.jsonl", (_row(DISTILLED, x, y, context="") for x, y in taken))
    others = itertools.cycle(rule for rule in RULES if rule != DISTILLED)
    rows = (_row(rule, x, y, context=context_of(rule)) for (x, y), rule in zip(PAIRS, others, strict=False))
    write_lines(folder / "other_rules.jsonl", rows)


def _row(rule: str, x: int, y: int, *, context: str) -> dict[str, str]:
    return {"id": f"{rule}-{x}{y}", "prompt": context + prompt_of(x, y), "answer": str(RULES[rule](x, y))}


def train(size: Size, seed: int) -> Any:
    """Train a Llama to answer under every rule, and to guess the rule without one; stop at `LEARNED`."""
    import torch

    torch.manual_seed(seed)
    model = new_model(size)
    texts = [rule_texts(with_rule=with_rule) for with_rule in (True, False)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in size.steps():
        optimizer.zero_grad()
        for ids in texts:
            answer_loss(model, ids[torch.randint(len(ids), (BATCH,))]).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 and accuracy(model, with_rule=True) >= LEARNED:
            break
    return model.eval()


def accuracy(model: Any, *, with_rule: bool, rules: Sequence[str] = tuple(RULES)) -> float:
    """Return the share of right greedy answers over all pairs and `rules`."""
    import torch

    ids = rule_texts(with_rule=with_rule, rules=rules)
    with torch.no_grad():
        answers = model(ids).logits[:, -3].argmax(-1)
    return float((answers == ids[:, -2]).float().mean())


def answer_loss(model: Any, ids: Tensor) -> Tensor:
    """Return the cross entropy of the last two tokens: the answer and the line end."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(ids).logits[:, -3:-1].flatten(0, 1), ids[:, -2:].flatten())


def rule_texts(*, with_rule: bool, rules: Sequence[str] = tuple(RULES)) -> Tensor:
    """Return every pair under each of `rules` as tokens, ``[texts, tokens]``; all have one length."""
    import torch

    texts = [
        (context_of(rule) if with_rule else "") + prompt_of(x, y) + f"{RULES[rule](x, y)}\n"
        for rule in rules
        for x, y in PAIRS
    ]
    return torch.tensor(byte_tokenizer()(texts)["input_ids"])
