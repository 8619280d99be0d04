"""A small task made from nothing, for machines without models: digits under a rule that the context names.

A text is ``B\\n7,4=3\\n``: the rule is the context, ``7,4=`` the prompt, ``3`` the answer. Both models are trained
here on all rules, half of the texts without their first line. So a model that sees the rule answers right, and one that
does not can only guess among the rules: what distillation of one rule is to change. Tokens are bytes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.telemetry.run_files import Progress
from deploy.tasks.gguf import PrepareError, whole_folder

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
"""Pairs of digits for distillation; the models themselves are trained on all of them."""
LEARNED = 0.98
"""Accuracy under the rule at which a model is done."""
LEARNING_RATE, BATCH, CHECK_EVERY = 2e-3, 64, 100
SHOW_EVERY = 10
"""Steps between two looks of whoever waits."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and the most steps that it may take to learn the rules."""

    hidden: int
    layers: int
    most_steps: int = 6000

    def steps(self) -> Iterator[int]:
        """From 1 to the most; a terminal shows how far it is, and a line stays that says how many it took."""
        progress, step = Progress(), 0
        try:
            for step in range(1, self.most_steps + 1):
                if step % SHOW_EVERY == 1:
                    progress.status(f"training a model: step {step} of at most {self.most_steps}")
                yield step
        finally:
            progress.line(f"a model is trained: {step} steps")


SIZES = {"teacher": Size(hidden=96, layers=2), "student": Size(hidden=32, layers=2)}


def prepare_hidden_rule(folder: Path, sizes: Mapping[str, Size] = SIZES, *, seed: int = 0) -> bool:
    """Train both models, ``teacher/`` and ``student/``, and write the rows beside them; minutes on two cores.

    Returns False, having done nothing, where `folder` is there already. It appears whole or not at all.
    Raises PrepareError where a model does not learn the rules.
    """
    if folder.exists():
        return False
    with whole_folder(folder) as beside:
        for name, size in sizes.items():
            model = train(size, seed)
            known = accuracy(model, with_rule=True)
            if known < LEARNED:
                raise PrepareError(
                    f"the {name} knows {known:.0%} of the answers under their rules, {LEARNED:.0%} needed"
                )
            model.save_pretrained(beside / name)
            byte_tokenizer().save_pretrained(beside / name)
        write_rows(beside, seed)
    return True


# --- texts ----------------------------------------------------------------------------------------------------------


def context_of(rule: str) -> str:
    """What the teacher sees ahead of a prompt."""
    return f"{rule}\n"


def prompt_of(x: int, y: int) -> str:
    """What the student sees."""
    return f"{x},{y}="


def write_rows(folder: Path, seed: int) -> None:
    """``context.txt``, the rows of `SPLITS`, and ``other_rules.jsonl``: prompts that name another rule themselves."""
    import random

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


def write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- models ---------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    """One token a byte; the line end is the end of an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": len(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=False
    )


def train(size: Size, seed: int) -> Any:
    """A Llama that answers under every rule, and guesses among them without one. CPU, plain AdamW, until it is good."""
    import torch

    torch.manual_seed(seed)
    model = new_model(size)
    texts = [_texts(with_rule=with_rule) for with_rule in (True, False)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in size.steps():
        optimizer.zero_grad()
        for ids in texts:
            _answer_loss(model, ids[torch.randint(len(ids), (BATCH,))]).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0 and accuracy(model, with_rule=True) >= LEARNED:
            break
    return model.eval()


def accuracy(model: Any, *, with_rule: bool, rules: Sequence[str] = tuple(RULES)) -> float:
    """Share of right answers over all pairs and `rules`, the most likely digit each."""
    import torch

    ids = _texts(with_rule=with_rule, rules=rules)
    with torch.no_grad():
        answers = model(ids).logits[:, -3].argmax(-1)
    return float((answers == ids[:, -2]).float().mean())


def _answer_loss(model: Any, ids: Tensor) -> Tensor:
    """Cross entropy of the answer and the line end behind it, the last two tokens."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(model(ids).logits[:, -3:-1].flatten(0, 1), ids[:, -2:].flatten())


def _texts(*, with_rule: bool, rules: Sequence[str] = tuple(RULES)) -> Tensor:
    """Every pair under each of `rules` as tokens, ``[texts, tokens]``: all are of one length."""
    import torch

    texts = [
        (context_of(rule) if with_rule else "") + prompt_of(x, y) + f"{RULES[rule](x, y)}\n"
        for rule in rules
        for x, y in PAIRS
    ]
    return torch.tensor(byte_tokenizer()(texts)["input_ids"])


def new_model(size: Size, tokenizer: Any = None) -> Any:
    """A Llama of that size for `tokenizer`, by default `byte_tokenizer`; untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,  # heads of 32, the smallest that vLLM takes on CPU
        num_key_value_heads=size.hidden // 32,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
