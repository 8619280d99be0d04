"""Names in the glossary and files in the tables exist; the loop is as long as its page says."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from tests.support.documentation import texts_of_the_code
from tests.support.paths import ROOT

GLOSSARY = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in GLOSSARY.splitlines() if line[:2] == "| "]
CODE = [name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[2])]
STAGED = r"(?:time/\w+_s|time/wait_ratio/\w+|queue_depth/\w+|staleness/\w+|env/\w+|parity/\w+|(?:rollout|accuracy)/…)"
"""Metrics whose names the code composes."""


def test_the_glossary_has_four_columns() -> None:
    assert len(ROWS) > 40
    assert {len(row) for row in ROWS} == {4}


@pytest.mark.parametrize("name", CODE)
def test_a_name_of_the_code_exists(name: str) -> None:
    assert exists(name)


def test_a_missing_name_is_found() -> None:
    assert not exists("learner.loop.training_loop.Stream")
    assert not exists("learner.controller")


def exists(name: str) -> bool:
    """Return True if a module, class, attribute or dataclass field has that dotted name."""
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                return split < len(parts) and part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


def test_every_key_and_metric_exists() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    known = {*re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE), *texts_of_the_code()}
    names = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[3])}
    assert len(names) > 60
    unknown = [name for name in names - known if not name.endswith((".json", ".jsonl"))]
    assert [name for name in unknown if not re.fullmatch(STAGED, name)] == []


def test_every_file_of_the_table_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Where things are")[2].partition("\n## ")[0]
    paths = re.findall(r"`((?:learner|common|rollout_workers|teacher_server|deploy)/[\w./-]+)`", table)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_loop_is_three_files_of_about_700_lines() -> None:
    page = (ROOT / "docs/loop.md").read_text(encoding="utf-8")
    table = page.partition("## Three files")[2].partition("\n\nA fourth")[0]
    paths = re.findall(r"^\| `(learner/loop/\w+\.py)` \|", table, re.MULTILINE)
    assert len(paths) == 3
    assert "about 700 lines" in table
    assert 600 < sum(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths) < 750
