"""The task ``hidden-rule``: its rows, its tokens, and a folder that is written complete or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from common.config.loader import load_config
from common.data.fingerprint import tokenizer_fingerprint
from common.data.model_lookup import load_tokenizer
from common.data.rendering import Renderer
from common.data.rows import read_rows
from deploy.tasks import hidden_rule
from deploy.tasks.folders import PrepareError
from deploy.tasks.hidden_rule import (
    DISTILLED,
    PAIRS,
    RULES,
    accuracy,
    answer_loss,
    context_of,
    rule_texts,
    train,
    write_rows,
)
from deploy.tasks.small_training import Size, byte_tokenizer
from rollout_workers.engine.stop_strings import resolve_stop_strings
from tests.support.paths import ROOT

TINY = {"teacher": Size(hidden=64, layers=1, max_steps=3), "student": Size(hidden=32, layers=1, max_steps=3)}


def test_rules_cannot_be_told_from_the_prompt() -> None:
    """No two rules are the same; of any prompt, knowing no rule, at most a part of the answers can be right."""
    tables = {rule: tuple(of(x, y) for x, y in PAIRS) for rule, of in RULES.items()}
    assert len(set(tables.values())) == len(RULES)
    assert all(0 <= answer <= 9 for table in tables.values() for answer in table)
    best = [max(column.count(answer) for answer in column) for column in zip(*tables.values(), strict=True)]
    assert sum(best) / len(best) / len(RULES) < 0.5


def test_rows_of_the_splits_are_apart_and_answered_under_the_distilled_rule(tmp_path: Path) -> None:
    write_rows(tmp_path, seed=0)
    rows = {name: read_rows(tmp_path / f"{name}.jsonl", need_answers=True) for name in ("train", "valid", "eval")}
    ids = [row.id for split in rows.values() for row in split]
    assert len(ids) == len(set(ids)) == len(PAIRS)
    for row in rows["eval"]:
        x, y = map(int, str(row.prompt).removesuffix("=").split(","))
        assert row.answer == str((x - y) % 10)
    others = read_rows(tmp_path / "other_rules.jsonl", need_answers=True)
    assert {str(row.prompt).split("\n")[0] for row in others} == set(RULES) - {DISTILLED}
    assert (tmp_path / "context.txt").read_bytes() == context_of(DISTILLED).encode()


def test_what_a_run_renders_is_what_the_models_were_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    byte_tokenizer().save_pretrained(folder)
    write_rows(tmp_path, seed=0)
    tokenizer = load_tokenizer(folder)
    config = load_config(ROOT / "deploy/configs/cross_size_small.yaml")
    renderer = Renderer(tokenizer, (tmp_path / "context.txt").read_text(), config.student)
    row = read_rows(tmp_path / "eval.jsonl")[0]
    prompt = renderer.render(row)
    assert prompt.context is not None
    whole = [*renderer.contexts[prompt.context].ids, *prompt.teacher_ids]
    assert whole == tokenizer(context_of(DISTILLED) + str(row.prompt))["input_ids"]
    assert prompt.student_ids.tolist() == tokenizer(str(row.prompt))["input_ids"]
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    stops = resolve_stop_strings(config.rollout.stop, texts, {"<end>": tokenizer.eos_token_id})
    assert list(stops.token_ids) == tokenizer("\n")["input_ids"]
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(byte_tokenizer())


def test_accuracy_is_that_of_the_answers_digit() -> None:
    class Knows(torch.nn.Module):
        """Says, at every position, the token that really comes next: right by construction."""

        def forward(self, ids: torch.Tensor) -> object:
            following = torch.cat([ids[:, 1:], ids[:, :1]], dim=-1)
            return type("Output", (), {"logits": torch.nn.functional.one_hot(following, 300).float()})

    assert accuracy(Knows(), with_rule=True) == accuracy(Knows(), with_rule=False) == 1.0


def test_training_lowers_the_loss_and_is_the_same_every_time() -> None:
    texts = rule_texts(with_rule=True)

    def loss_after(steps: int) -> float:
        model = train(Size(hidden=32, layers=1, max_steps=steps), 0)
        with torch.no_grad():
            return float(answer_loss(model, texts))

    first, again, fresh = loss_after(12), loss_after(12), loss_after(1)
    assert first == again
    assert first < fresh - 0.5


def test_training_ends_when_the_rules_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(hidden_rule, "CHECK_EVERY", 2)
    monkeypatch.setattr(hidden_rule, "accuracy", lambda model, with_rule: steps.append(with_rule) or len(steps) / 3)
    train(Size(hidden=32, layers=1, max_steps=100), 0)
    assert steps == [True] * 3


def test_a_model_that_did_not_learn_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"the teacher answers \d+% right when it sees the rule, 98% needed"):
        hidden_rule.prepare_hidden_rule(tmp_path / "models/rule", TINY)
    assert list((tmp_path / "models").iterdir()) == []


def test_both_models_and_the_rows_appear_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hidden_rule, "LEARNED", 0.0)
    folder = tmp_path / "rule"
    assert hidden_rule.prepare_hidden_rule(folder, TINY)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "teacher",
        "student",
        "context.txt",
        "train.jsonl",
        "valid.jsonl",
        "eval.jsonl",
        "other_rules.jsonl",
    }
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("student", "teacher"))
    assert student.num_parameters() < teacher.num_parameters()
    assert json.loads((folder / "eval.jsonl").read_text().splitlines()[0])["answer"].isdigit()
    assert not hidden_rule.prepare_hidden_rule(folder, TINY)


def test_training_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("os.get_terminal_size", lambda: os.terminal_size((80, 24)))
    for step in Size(hidden=32, layers=1, max_steps=30).steps():
        if step == 15:
            break
    printed = capsys.readouterr().out
    assert "step 1 of at most 30" in printed
    assert "step 11 of at most 30" in printed
    assert printed.endswith("model trained: 15 steps\n")
