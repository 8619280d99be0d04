"""A user's folder with a package of one of opcd's names is refused in one line; other modules in it can be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import opcd_start
from common.config.model import ConfigError
from common.evaluation.graders import make_grader
from common.import_names import PACKAGES, check_import_names, use_folder
from deploy.cli.main import app
from rollout_workers.environments.registry import make_environment
from tests.support.paths import ROOT

COMMANDS = (
    ("train", "run.yaml"),
    ("train", "run.yaml", "--dry-run"),
    ("evaluate", "run.yaml"),
    ("compare", "run.yaml"),
    ("experience", "extract", "run.yaml"),
    ("submit", "run.yaml", "--address", "http://127.0.0.1:1"),
    ("submit", "run.yaml", "--address", "http://127.0.0.1:1", "--print"),
)
TASK = """
from rollout_workers.environments.base import Step

def grade(answer, expected):
    return answer == expected

class Game:
    async def reset(self, seed):
        return "look"
    async def step(self, answer):
        return Step("", 1.0, True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a run. Restores sys.path after the test."""
    (tmp_path / "train.jsonl").write_text('{"id": "a", "prompt": "Q"}\n')
    (tmp_path / "run.yaml").write_text(
        "run: {name: mine, dir: /shared/runs}\nstudent: {model: /shared/m}\ncontext: {text: c}\n"
        "data: {train: train.jsonl}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def add_package(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_refuses_a_folder_that_hides_a_package(folder: Path, words: tuple[str, ...]) -> None:
    add_package(folder, "common")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"opcd: {folder} holds a Python package or module `common`")
    assert "rename it" in line


@pytest.mark.parametrize("name", PACKAGES)
def test_each_name_is_refused_as_a_package_and_as_a_module(folder: Path, name: str) -> None:
    add_package(folder, name)
    with pytest.raises(ConfigError, match=f"`{name}`"):
        check_import_names(folder)
    shutil.rmtree(folder / name)
    (folder / f"{name}.py").touch()
    with pytest.raises(ConfigError, match=f"`{name}`"):
        check_import_names(folder)


def test_folders_without_code_pass_unless_an_entry_has_the_name_of_a_module(folder: Path) -> None:
    (folder / "deploy/configs").mkdir(parents=True)  # of the documentation's first run
    (folder / "common/notes").mkdir(parents=True)
    check_import_names(folder)
    (folder / "common/data").mkdir()
    with pytest.raises(ConfigError, match="`common`"):
        check_import_names(folder)


def test_a_clone_of_the_running_opcd_passes(folder: Path) -> None:
    check_import_names(ROOT)
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    check_import_names(folder)
    (folder / "common/import_names.py").write_text("# changed\n")
    with pytest.raises(ConfigError, match="`common`"):
        check_import_names(folder)


def test_graders_and_environments_of_the_folder_can_be_imported(folder: Path) -> None:
    (folder / "my_task.py").write_text(TASK)
    (folder / "json.py").write_text("raise RuntimeError")  # installed modules come first
    use_folder(folder)
    assert make_grader("my_task:grade")("a", "a") is True
    assert make_environment("my_task:Game")
    assert sys.path.index(str(folder)) == len(sys.path) - 1
    use_folder(folder)
    assert sys.path.count(str(folder)) == 1


OPCD = ("-P", "-c", "from opcd_start import main; main()", "train", "run.yaml")
"""What the script ``opcd`` does: Python's path has the folders of PYTHONPATH and not the working folder."""
LEARNER = ("-m", "learner.train", "run.yaml")
"""Python's path begins with the working folder. If that holds a `learner`, no code of opcd runs."""


@pytest.mark.parametrize(
    ("words", "name"),
    [(OPCD, name) for name in PACKAGES] + [(LEARNER, name) for name in PACKAGES if name != "learner"],
)
def test_a_package_that_hides_one_of_opcds_is_one_line(folder: Path, words: tuple[str, ...], name: str) -> None:
    add_package(folder, name)
    path = f"{folder}{os.pathsep}{ROOT}" if words is OPCD else str(ROOT)
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"opcd: `{name}` is imported from {folder / name}")


def test_opcd_starts_with_the_check() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"opcd": "opcd_start:main"}
    assert opcd_start.PACKAGES == PACKAGES
