"""The task ``experience-rule``: its texts are the pipeline's, its rows reveal no answer, its folder appears complete or
not at all.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from common.config.loader import load_config
from common.data.rendering import SEPARATOR, Renderer
from common.data.rows import read_rows
from deploy.tasks import experience_rule
from deploy.tasks.experience_rule import (
    DISTILLED,
    EXAMPLES,
    MAX_EXAMPLES,
    MAX_ITEMS,
    RULES,
    SPLITS,
    Rule,
    context_of,
    loss,
    prepare_experience_rule,
    primer,
    question,
    reflection,
    skills,
    solved,
    texts,
    train,
    write_rows,
)
from deploy.tasks.folders import PrepareError
from deploy.tasks.small_training import Size, byte_tokenizer
from learner.experience.prompts import load_templates, parse_items
from tests.support.paths import ROOT

CONFIG = ROOT / "deploy/configs/experience_small.yaml"
TINY = Size(hidden=32, layers=1, max_steps=3)


class Knows(torch.nn.Module):
    """Says, at every position, the token that really comes next: right by construction."""

    def forward(self, ids: torch.Tensor) -> object:
        following = torch.cat([ids[:, 1:], ids[:, :1]], dim=-1)
        return type("Output", (), {"logits": torch.nn.functional.one_hot(following, 300).float()})


def right(line: str, rule: Rule) -> bool:
    *digits, answer = map(int, re.findall(r"\d", line))
    return answer == rule.answer(tuple(digits))


def test_a_rule_cannot_be_told_from_a_question() -> None:
    """Every rule answers otherwise: of different digits, knowing no rule, one answer in four can be right."""
    assert len({str(rule) for rule in RULES}) == len({rule.answer((4, 8, 1, 5)) for rule in RULES}) == 4
    assert DISTILLED.answer((4, 8, 1, 5)) == 8
    assert str(DISTILLED) == "b"


def test_rows_tell_no_answer_that_is_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path, seed=0)
    rows = {name: read_rows(tmp_path / f"{name}.jsonl", need_answers=name != "train") for name in SPLITS}
    assert {name: len(found) for name, found in rows.items()} == SPLITS
    assert all(row.answer is None for row in rows["train"])
    prompts = [str(row.prompt).split("\n") for row in rows["train"]]
    assert [sum(len(lines) - 1 == count for lines in prompts) for count in EXAMPLES] == [40] * len(EXAMPLES)
    assert all(right(line, DISTILLED) for lines in prompts for line in lines[:-1])
    trained = {line.split("=")[0] for lines in prompts for line in lines}
    held_out = [str(row.prompt).removesuffix("=") for name in ("valid", "eval") for row in rows[name]]
    assert len(set(held_out)) == len(held_out)
    assert trained.isdisjoint(held_out)
    assert all(right(f"{row.prompt}{row.answer}", DISTILLED) for row in rows["eval"])


def test_rows_of_other_rules_carry_their_examples(tmp_path: Path) -> None:
    write_rows(tmp_path, seed=0)
    for row in read_rows(tmp_path / "other_rules.jsonl", need_answers=True):
        (rule,) = (rule for rule in RULES if row.id.startswith(f"{rule}-"))
        assert rule != DISTILLED
        lines = f"{row.prompt}{row.answer}".split("\n")
        assert len(lines) == 4
        assert all(right(line, rule) for line in lines)


def test_what_the_pipeline_shows_is_what_the_model_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(CONFIG)
    templates = load_templates(config.experience.templates)
    answer = reflection(DISTILLED).removeprefix("Why?\n").removesuffix("<end>")
    assert parse_items(answer) == (str(DISTILLED),)
    digits = (4, 8, 1, 5)
    attempt = templates.extraction_prompt(question(digits), str(DISTILLED.answer(digits)), game=False) + "\n"
    assert attempt + answer == solved(DISTILLED, [digits]) + reflection(DISTILLED).removesuffix("<end>")
    several = (Rule(0), DISTILLED, DISTILLED)
    context = templates.context_text(tuple(map(str, several))) + SEPARATOR
    assert context == context_of(several)
    tokenizer = byte_tokenizer()
    write_rows(tmp_path, seed=0)
    renderer = Renderer(tokenizer, context, config.student)
    row = read_rows(tmp_path / "eval.jsonl")[0]
    prompt = renderer.render(row)
    assert prompt.context is not None
    assert [*renderer.contexts[prompt.context].ids, *prompt.teacher_ids] == tokenizer(context + str(row.prompt))[
        "input_ids"
    ]
    assert (tmp_path / "given.txt").read_text() == context_of([DISTILLED])


def test_the_configuration_keeps_to_what_the_model_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(CONFIG)
    assert config.context.pool == config.run.path / "experience/selected.jsonl"
    longest = len(context_of([DISTILLED] * MAX_ITEMS))
    assert longest <= config.experience.max_context_tokens < longest + len("- b\n")
    answer = reflection(DISTILLED).removeprefix("Why?\n").replace("<end>", "!")
    assert len(answer) <= (config.experience.max_tokens or 0)
    write_rows(tmp_path, seed=0)
    (others,) = config.eval.ood.values()
    for path in (config.data.train, config.data.valid, config.data.eval, others):
        assert path is not None
        assert (tmp_path / Path(str(path)).relative_to("models/experience-rule")).is_file()


@pytest.mark.parametrize(("items", "examples", "reflecting"), [(0, 4, True), (5, 1, False), (10, 3, False)])
def test_what_is_learned_of_a_text_is_its_answers(items: int, examples: int, reflecting: bool) -> None:
    batch = texts(random.Random(1), 20, items=items, examples=examples, reflecting=reflecting)
    tokenizer = byte_tokenizer()
    for ids in batch.ids:
        text = tokenizer.decode(ids)
        context, questions, behind = re.fullmatch(
            r"((?:- [^\n]*\n)*)\n?((?:[a-d\d]{8}=\d\n)*)(.*)", text, re.DOTALL
        ).groups()
        lines = questions.splitlines()
        assert len(lines) == examples
        assert context.count("\n") == items
        (rule,) = (
            rule for rule in RULES if all(right(line, rule) for line in lines) and is_named(rule, context, behind)
        )
        learned = "".join(f"{line[-1]}\n" for line in lines) + reflection(rule).removeprefix("Why?\n") * reflecting
        assert tokenizer.decode(ids[list(batch.learned)]) == learned


def is_named(rule: Rule, context: str, behind: str) -> bool:
    """Return True if most lines of the context, or the answer after the examples, name `rule`."""
    lines = context.splitlines()
    return lines.count(f"- {rule}") > len(lines) / 2 if lines else f"ITEM: {rule}<" in behind


def test_the_primer_names_whose_a_digit_is() -> None:
    batch = primer(random.Random(1), 20)
    for text in byte_tokenizer().batch_decode(batch.ids):
        digits, answer, letter = text[:8], text[9], text[10]
        assert text[8] == ":"
        assert letter + answer in digits
    assert list(batch.learned) == [10]


def test_skills_are_shares_of_right_answers() -> None:
    assert skills(Knows(), 0, count=20) == {"guessed": 1.0, "given": 1.0, "inferred": 1.0, "named": 1.0}
    untrained = skills(train(Size(hidden=32, layers=1, max_steps=0), 0), 0, count=20)
    assert all(share < 0.6 for share in untrained.values())


def test_training_lowers_the_loss_and_is_the_same_every_time() -> None:
    batch = texts(random.Random(0), 32, items=0, examples=MAX_EXAMPLES, reflecting=True)

    def loss_after(steps: int) -> float:
        model = train(Size(hidden=32, layers=1, max_steps=steps), 0)
        with torch.no_grad():
            return float(loss(model, batch))

    first, again, fresh = loss_after(8), loss_after(8), loss_after(1)
    assert first == again
    assert first < fresh - 0.5


def test_a_model_that_did_not_learn_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"right answers: given \d+% \(95% needed\), inferred"):
        prepare_experience_rule(tmp_path / "models/rule", TINY)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_model_and_the_rows_appear_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(experience_rule, "LEARNED", {"given": 0.0})
    folder = tmp_path / "rule"
    assert prepare_experience_rule(folder, TINY)
    names = {"model", "given.txt", "train.jsonl", "valid.jsonl", "eval.jsonl", "other_rules.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    AutoModelForCausalLM.from_pretrained(folder / "model")
    assert json.loads((folder / "eval.jsonl").read_text().splitlines()[0])["answer"].isdigit()
    assert not prepare_experience_rule(folder, TINY)
