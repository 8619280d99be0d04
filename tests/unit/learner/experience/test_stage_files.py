"""Stage files: resumed after a crash, refused for other inputs, written whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.config.model import ConfigError
from learner.experience.stage_files import StageFile, read_stage, write_lines


def test_a_stage_continues_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "experience" / "solved.jsonl"
    file = StageFile(path, {"model": "m", "stop": ("a",)})
    file.add([{"n": 1}, {"n": 2}])
    file.close()
    path.write_text(path.read_text() + '{"n": 3, "text": "cut sh')
    again = StageFile(path, {"stop": ("a",), "model": "m"})
    assert again.rows == [{"n": 1}, {"n": 2}]
    again.add([{"n": 3}])
    again.close()
    assert read_stage(path, "extract") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert len(path.read_text().splitlines()) == 4


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "solved.jsonl"
    StageFile(path, {"model": "m", "seed": 1}).close()
    before = path.read_text()
    with pytest.raises(ConfigError) as caught:
        StageFile(path, {"model": "n", "seed": 1, "new": True})
    assert "model was 'm' and is 'n'" in str(caught.value)
    assert "new was None and is True" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert path.read_text() == before


def test_a_missing_stage_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `opcd experience extract` first"):
        read_stage(tmp_path / "extracted.jsonl", "extract")
    StageFile(tmp_path / "extracted.jsonl", {"model": "m"}).close()
    with pytest.raises(ConfigError, match="run `opcd experience extract` first"):
        read_stage(tmp_path / "extracted.jsonl", "extract")


def test_lines_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "pool" / "pool.jsonl"
    write_lines(path, [{"id": "a", "text": "é"}])
    write_lines(path, [{"id": "b", "text": "x"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": "b", "text": "x"}]
    assert [one.name for one in path.parent.iterdir()] == ["pool.jsonl"]
