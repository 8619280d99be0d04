"""``opcd init`` writes a configuration that passes the dry run, from what the model and the rows are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from common.config.loader import load_config
from common.config.model import Config
from deploy.cli import init as cli_init
from deploy.cli.main import app
from deploy.starter.start import Start, start_text
from learner.preflight.checks import preflight
from tests.support.paths import ROOT
from tests.support.tokenizers import build_tokenizer

CHAT = [{"role": "user", "content": "Plural of cat?"}]
RAW = {"prompt": "Q: cat\nA:"}


@pytest.fixture(autouse=True)
def in_a_folder_with_a_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "context.txt").write_text("Answer with the plural.\n")


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps({"id": str(index), **row}) + "\n" for index, row in enumerate(rows)))
    return name


def opcd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def made(model: Path, *rows: dict[str, Any], answer: str = "cats", gpus: int = 0) -> Config:
    """The configuration that `opcd init` writes for `rows`, once the dry run has passed."""
    write("train.jsonl", *rows)
    write("eval.jsonl", *({**row, "answer": answer} for row in rows))
    options = {"--model": model, "--context": "context.txt", "--train": "train.jsonl", "--eval": "eval.jsonl"}
    result = opcd("mine.yaml", *(str(word) for pair in options.items() for word in pair), "--gpus", str(gpus))
    assert result.exit_code == 0, result.output
    assert "opcd train mine.yaml --dry-run" in result.stdout
    config = load_config("mine.yaml")
    assert gpus or preflight(config, offline=True).texts("error") == []
    return config


def test_chat_rows(tiny_model: Path) -> None:
    config = made(tiny_model, {"messages": CHAT})
    assert (config.context.placement, config.rollout.stop, config.eval.grader) == (None, (), "contains")
    assert (config.rollout.batch_size, config.rollout.max_tokens) == (1, 256)
    assert config.run.name == "mine"


def test_raw_rows_with_answers_of_one_line_end_at_a_newline(tiny_model: Path) -> None:
    config = made(tiny_model, RAW)
    assert (config.rollout.stop, config.eval.grader) == (("\n",), "exact")
    assert config.rollout.max_tokens == 2 * len(" cats") + 4  # bytes are tokens


def test_answers_of_several_lines_end_by_themselves(tiny_model: Path) -> None:
    config = made(tiny_model, RAW, answer="cats\ndogs")
    assert (config.rollout.stop, config.rollout.max_tokens) == ((), 256)


def test_rows_of_trl_get_a_mapping(tiny_model: Path) -> None:
    assert made(tiny_model, {"prompt": CHAT}).data.columns == {"messages": "prompt"}


def test_a_context_that_is_a_list_of_messages_becomes_turns(tiny_model: Path) -> None:
    Path("context.txt").write_text("- {role: user, content: dog}\n- {role: assistant, content: dogs}\n")
    assert made(tiny_model, {"messages": CHAT}).context.placement == "turns"


def test_a_template_without_a_system_turn_gets_the_context_into_the_user_turn(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "no-system")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    build_tokenizer(template + (build_tokenizer().chat_template or "")).save_pretrained(folder)
    assert made(folder, {"messages": CHAT}).context.placement == "user_prefix"


def test_a_long_context_leaves_shorter_answers(tiny_model: Path) -> None:
    Path("context.txt").write_text("x" * 4000)
    config = made(tiny_model, {"messages": CHAT})
    assert 0 < config.rollout.max_tokens < 96  # of the model's 4,096
    Path("context.txt").write_text("x" * 4090)
    refused = opcd("other.yaml", "--model", tiny_model, "--context", "context.txt", "--train", "train.jsonl")
    assert refused.exit_code == 2
    assert "the longest prompt with the context has" in refused.stderr
    assert not Path("other.yaml").exists()


@pytest.mark.parametrize(("gpus", "part", "kind"), [(1, 0.5, "base"), (2, 1, "base"), (3, 1, "frozen")])
def test_gpus_are_shared_out(tiny_model: Path, gpus: int, part: float, kind: str) -> None:
    config = made(tiny_model, RAW, gpus=gpus)
    assert (config.learner.gpus_per_rank, config.rollout.gpus_per_worker) == (part, part)
    assert config.teacher.kind == kind
    assert config.teacher.gpus == (1 if kind == "frozen" else 0)


def test_a_terminal_is_asked_for_what_is_missing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("train.jsonl", RAW)
    answers = {"Model": str(tiny_model), "Context": "context.txt", "Prompts": "train.jsonl", "Held-out": ""}
    monkeypatch.setattr(cli_init, "_on_a_terminal", lambda: True)
    monkeypatch.setattr(cli_init.typer, "prompt", lambda question, **_: answers[question.split()[0]])
    assert opcd().exit_code == 0
    config = load_config("own.yaml")
    assert (config.student.model, config.data.eval) == (str(tiny_model), None)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "--model is missing"),
        (("--model", "models/none", "--context", "context.txt", "--train", "train.jsonl"), "no such folder (seen from"),
        (("--model", "some/name", "--context", "none.txt", "--train", "train.jsonl"), "cannot read none.txt"),
        (("--model", "some/name", "--context", "context.txt", "--train", "none.jsonl"), "cannot read none.jsonl"),
        (("train.jsonl",), "exists already"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(arguments: tuple[str, ...], part: str) -> None:
    Path("models").mkdir()
    write("train.jsonl", RAW)
    result = opcd(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert part in line
    assert not Path("own.yaml").exists()


def test_a_model_that_is_not_here_yet_is_a_note() -> None:
    write("train.jsonl", RAW)
    result = opcd("--model", "some/name", "--context", "context.txt", "--train", "train.jsonl")
    assert result.exit_code == 0, result.output
    assert "some/name is not on this machine" in result.stderr


def test_the_file_in_the_repository_is_the_same_text() -> None:
    assert (ROOT / "deploy/configs/own.yaml").read_text() == start_text(Start())
