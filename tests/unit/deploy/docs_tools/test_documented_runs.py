"""Runs the documentation's commands that take seconds; other tests pass the options of the longer ones."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from deploy.cli.main import app
from deploy.tasks.gguf import SMOLLM2_PACKAGE, SMOLLM2_REQUIREMENT, find_packaged_gguf
from tests.support.documentation import PAGES, ROOT, commands, inline_commands

DOCS = ROOT / "docs"
OTHERS = ("test_documentation.py", Path(__file__).name)
FILES = {"--model": "model", "--context": "context.txt", "--train": "train.jsonl", "--eval": "eval.jsonl"}
"""Answers to what `opcd init` asks on a terminal, as options."""


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_a_run_of_ones_own_passes_its_check(
    page: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs `opcd init` and the dry run of the page in a folder with the files that the page tells to write."""
    words = [command.words[1:] for command in commands(ROOT / page) if command.words[0] == ".venv/bin/opcd"]
    made, checked, run = words[:3]
    assert (made[0], checked[0], run) == ("init", "train", tuple(word for word in checked if word != "--dry-run"))
    (tmp_path / "context.txt").write_text("Q: dog\nA: dogs\n")
    (tmp_path / "train.jsonl").write_text('{"id": "1", "prompt": "Q: cat\\nA:"}\n')
    (tmp_path / "eval.jsonl").write_text('{"id": "2", "prompt": "Q: cup\\nA:", "answer": "cups"}\n')
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    options = [word for pair in FILES.items() for word in pair]
    for arguments in ((*made, *options), checked):
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 0, result.output
    facts = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert facts["rows"] == "1 train, 1 eval"
    assert Path(facts["folder"]).name == "mine"


def test_the_inspected_row_looks_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the page with SmolLM2's own tokenizer; the page shows some of its lines."""
    packaged = find_packaged_gguf(SMOLLM2_PACKAGE, SMOLLM2_REQUIREMENT)
    for loader in (AutoTokenizer, AutoConfig):
        loader.from_pretrained(packaged.parent, gguf_file=packaged.name).save_pretrained(tmp_path)
    shown = re.search(
        r"```bash\nopcd (inspect [^\n]+)\n```\n\n```text\n(.*?)```", (DOCS / "report.md").read_text(), re.DOTALL
    )
    assert shown is not None
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, [*shlex.split(shown[1]), f"student.model={tmp_path}"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    printed = iter([line.split() for line in result.stdout.splitlines()])
    lines = [line.split() for line in shown[2].splitlines() if "more like these" not in line]
    assert len(lines) > 10
    assert [line for line in lines if line not in printed] == []  # each behind the one before


def test_by_hand_the_same_is_installed_as_by_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    by_make = re.findall(r"^\t\$\(PIP\) install --quiet (.*)$", makefile, re.MULTILINE)
    by_make = [re.sub(r"\$\(if .*?\) ", "", line) for line in by_make]
    by_hand = [
        shlex.join(one.words[2:])
        for one in commands(DOCS / "launching.md")
        if one.words[:2] == (".venv/bin/pip", "install")
    ]
    assert by_hand[:2] == by_make[:2]
    assert by_hand[2:] == ["."]
    assert by_make[2:] == ["--no-deps --editable ."]


def test_every_documented_option_is_passed_by_a_test() -> None:
    """A test passes each option of the commands that any machine can run."""
    asked = [command for page in PAGES for command in (*commands(page), *inline_commands(page)) if not command.marked]
    options = {
        (command.words[1], word)
        for command in asked
        if command.words[0].removeprefix(".venv/bin/") == "opcd"
        for word in command.words[2:]
        if word.startswith("--")
    }
    assert len(options) > 15
    texts = list(texts_of_tests())
    untried = [
        (name, option)
        for name, option in sorted(options)
        if not any(re.search(rf'"{name}"', text) and f'"{option}"' in text for text in texts)
    ]
    assert untried == []


def texts_of_tests() -> Iterator[str]:
    """Yield the text of every test file except the documentation's, each after the helpers that start runs."""
    lead = (ROOT / "tests/support/runs.py").read_text(encoding="utf-8")
    lead += (ROOT / "tests/e2e/conftest.py").read_text(encoding="utf-8")
    for folder in ("unit", "integration", "e2e", "faults"):
        for path in (ROOT / "tests" / folder).rglob("test_*.py"):
            if path.name not in OTHERS:
                yield lead + path.read_text(encoding="utf-8")
