"""Commands, keys, metrics and messages in the documentation exist in the code."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from common.config.loader import load_config, load_teacher_config
from common.config.model import ConfigError
from deploy.cli.main import app
from learner.loop.parity import ParityReport
from tests.support.documentation import (
    PAGES,
    ROOT,
    Command,
    as_pattern,
    commands,
    inline_commands,
    quoted_messages,
    simple_commands,
    texts_of_the_code,
)
from tests.support.imports import loaded_by

DOCS = ROOT / "docs"
HERE = {"opcd", "make", "python", "pip", "source", "export", "mkdir", "chmod", "tensorboard", "git", "cd"}
"""Programs that any machine with the environment has."""
TAKES_CONFIG = {"train", "teacher", "evaluate", "submit", "simulate"}
CLI = typer.main.get_command(app)
ALL = [command for page in PAGES for command in commands(page)]
INLINE = [command for page in PAGES for command in inline_commands(page)]


def name_of(command: Command) -> str:
    return command.words[0].removeprefix(".venv/bin/")


def of(program: str) -> list[Command]:
    return [command for command in ALL if name_of(command) == program]


@pytest.mark.parametrize("command", of("opcd"), ids=str)
def test_an_opcd_command_parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options exist, nothing required is missing, its file exists, its overrides are keys."""
    monkeypatch.chdir(ROOT)
    words = [word.strip("[]") for word in command.words[1:] if word not in ("...]", "…")]
    assert fault(words) is None


def fault(words: list[str]) -> str | None:
    """Return the reason why ``opcd`` refuses `words`, or None. Runs nothing."""
    found, name = CLI, "opcd"
    while isinstance(found, TyperGroup):
        if not words or words[0] not in found.commands:
            return f"{name} has no command {words[:1]}"
        name = words.pop(0)
        found = found.commands[name]
    try:
        params = found.make_context(name, list(words)).params
    except TyperException as error:
        return str(error)
    config = params.get("config")
    if name in TAKES_CONFIG and config and "/" in config and not (ROOT / config).is_file():
        return f"{config} does not exist"
    if name == "simulate" or "overrides" not in params:
        return None  # a test below runs the simulations
    overrides = [one for one in params["overrides"] or () if one.lower() != "key=value"]
    file = config if config and config.startswith(("deploy/", "docs/")) else "deploy/configs/demo.yaml"
    try:
        load_teacher_config(file, overrides) if name == "teacher" else load_config(file, overrides)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "words",
    [
        "nothing",
        "jobs",
        "train",
        "train a.yaml --nope",
        "train deploy/configs/none.yaml",
        "train a.yaml learner.stesp=1",
        "train a.yaml data.valid=null",
    ],
)
def test_a_command_that_would_fail_is_seen(words: str) -> None:
    assert fault(words.split()) is not None


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_a_make_target_exists(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        variable, equals, _ = word.partition("=")
        pattern = rf"^{variable} *\??=" if equals else rf"^{re.escape(word)}:"
        assert re.search(pattern, makefile, re.MULTILINE), word


@pytest.mark.parametrize("command", INLINE, ids=str)
def test_a_command_of_the_running_text_parses(command: Command) -> None:
    """A command without arguments, `opcd submit`, only names itself; a command with arguments must be complete."""
    words = list(command.words[1:])
    if len(words) > 1:
        assert fault(words) is None
    elif not words[0].startswith("--"):
        assert isinstance(CLI, TyperGroup)
        assert words[0] in CLI.commands


def test_there_are_commands_in_the_running_text() -> None:
    assert len({command.words[1] for command in INLINE}) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_with_special_needs_are_marked(page: Path) -> None:
    unmarked = [str(command) for command in commands(page) if not command.marked and name_of(command) not in HERE]
    assert unmarked == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_copied(page: Path) -> None:
    """No prompt stands before a command, and output has a block of its own."""
    text = page.read_text(encoding="utf-8")
    assert "```console" not in text
    assert re.findall(r"^\$ .*", text, re.MULTILINE) == []


@pytest.mark.parametrize("command", of("python"), ids=str)
def test_a_script_exists(command: Command) -> None:
    words = command.words[1:]
    if words[0] == "-m":
        module = words[1]
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or module in ("pip", "venv"), module
    else:
        assert (ROOT / words[0]).is_file()


def test_lines_are_cut_into_commands_as_a_shell_does() -> None:
    line = "A=1 opcd key team --out 'my key' >> keys && make test ARGS='-k x' | tail"
    assert list(simple_commands(line)) == [
        ("opcd", "key", "team", "--out", "my key"),
        ("make", "test", "ARGS=-k x"),
        ("tail",),
    ]


def test_every_quoted_message_is_in_the_code() -> None:
    texts = texts_of_the_code()
    messages = quoted_messages(DOCS / "troubleshooting.md", until="Other programs' messages")
    assert len(messages) > 40
    assert [message for message in messages if not any(as_pattern(message).search(text) for text in texts)] == []


def test_a_message_that_is_not_in_the_code_is_found() -> None:
    texts = texts_of_the_code()
    assert any(as_pattern("tokens on the … side").search(text) for text in texts)
    assert not any(as_pattern("tokens on the … sidewalk").search(text) for text in texts)


def test_every_metric_of_the_tuning_page_is_written_somewhere() -> None:
    code = "\n".join(texts_of_the_code())
    names = set(re.findall(r"`([a-z_]+(?:/[a-z0-9_]+)+)`", (DOCS / "tuning.md").read_text()))
    assert len(names) > 12
    waits = {f"time/wait_ratio/{queue}" for queue in ("rollout", "score", "sync", "parity")}
    parity = {f"parity/{field.name}" for field in fields(ParityReport)}
    assert [name for name in names - waits - parity if name not in code] == []


def test_every_key_of_the_guides_exists() -> None:
    page = (DOCS / "configuration.md").read_text()
    known = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    sections = "|".join({key.partition(".")[0] for key in known})
    for name in ("tuning.md", "cluster.md", "troubleshooting.md"):
        text = (DOCS / name).read_text()
        used = set(re.findall(rf"`((?:{sections})\.[a-z0-9_.]+[a-z0-9_])", text)) - {"run.yaml"}
        assert used
        assert sorted(used - known - {"teacher.md"}) == [], name


def test_the_simulators_output_is_what_it_prints() -> None:
    """Commands of the cluster page, with the block that follows each."""
    text = (DOCS / "cluster.md").read_text()
    shown = re.findall(r"```bash\nopcd (simulate [^\n]+)\n```\n\n```text\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 2
    for words, output in shown:
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli.main", *words.split()],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert [line.rstrip() for line in done.stdout.splitlines()] == output.splitlines()


def test_the_python_api_loads_what_its_page_says() -> None:
    """Every module of the table exists; the client, the wire form and the environments load nothing heavy."""
    table = (DOCS / "python-api.md").read_text()
    modules = re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)
    assert len(modules) == 10
    offered = [
        (module, name)
        for module, what in re.findall(r"^\| `([\w.]+)` \| (.*) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)(?:\(\w*\))?`", what)
    ]
    assert len(offered) > 15
    assert [one for one in offered if not hasattr(importlib.import_module(one[0]), one[1])] == []
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module
    light = [module for module in modules if not module.startswith("learner.") and module != "rollout_workers.actor"]
    assert loaded_by(light) == set()
    assert loaded_by(["learner.trainer.losses", "learner.trainer.output_layer"]) == {"torch"}
