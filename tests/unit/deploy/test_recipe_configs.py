"""The configurations of `deploy/configs/recipes/`: each passes the dry run with the rows that `opcd prepare` writes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common.config.loader import load_config
from common.data.answer_hook import load_answer_hook
from deploy.tasks.few_shot import write_task
from learner.preflight.checks import preflight
from tests.support.paths import ROOT

RECIPES = ROOT / "deploy/configs/recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the root of a clone after `opcd prepare few-shot`."""
    root: Path = tmp_path_factory.mktemp("clone")
    (root / "deploy").symlink_to(ROOT / "deploy")
    (root / "models/few-shot").mkdir(parents=True)
    write_task(root / "models/few-shot/past-tense", "past-tense", 0)
    return root


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_passes_the_dry_run(
    path: Path, folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    report = preflight(load_config(path, [f"student.model={tiny_model}", "run.dir=runs"]), offline=True)
    assert report.texts("error") == []
    assert report.inputs is not None
    (contexts,) = [text for name, text in report.summary_lines() if name == "contexts"]
    expected = {"row-contexts": "of the rows, ", "answer-contexts": "of the answers"}
    assert contexts.startswith(expected.get(path.stem, "1, "))
    assert f"opcd train deploy/configs/recipes/{path.name}" in path.read_text()


def test_the_right_answer_is_shown_after_a_mistake_only() -> None:
    hook = load_answer_hook("deploy.tasks.few_shot:right_answer_after_a_mistake")
    row = {"answer": "walked"}
    assert asyncio.run(hook(row, "Q: walk\nA:", " walks")) == "Q: walk\nA: walked\n" * 4
    assert asyncio.run(hook(row, "Q: walk\nA:", " walked")) is None
