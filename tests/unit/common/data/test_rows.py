"""Rows: validation with file and line, and the order of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.data.rows import DataError, batch_rows, read_rows


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_raw_and_chat_rows_are_read_and_extra_columns_ignored(tmp_path: Path) -> None:
    rows = read_rows(
        write(
            tmp_path,
            {"id": "a", "prompt": "p", "answer": "x", "source": "book"},
            "",
            {"id": 7, "messages": [{"role": "user", "content": "u"}]},
        )
    )
    assert [row.id for row in rows] == ["a", "7"]
    assert rows[0].answer == "x"


def test_every_bad_row_is_reported_with_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"id": "a", "prompt": "p"},
        {"id": "a", "prompt": "p"},
        {"id": "b", "promt": "p"},
        {"id": "c"},
        "{nope",
        {"id": "d", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]},
        {"id": "e", "messages": [{"role": "robot", "content": "u"}]},
        {"id": "f", "prompt": ""},
    )
    with pytest.raises(DataError) as error:
        read_rows(path)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5", "6", "7", "8"]
    assert all(line.startswith(f"{path}:") for line in lines)
    assert "did you mean 'prompt'" in lines[1]


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="and 5 more"):
        read_rows(write(tmp_path, *["x"] * 25))


def test_answers_are_required_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "p"})
    assert read_rows(path)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row 'a' has no `answer`"):
        read_rows(path, need_answers=True)


def test_a_callers_check_adds_faults(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": "a", "prompt": "p"}, {"id": "b", "prompt": "p"})
    with pytest.raises(DataError) as error:
        read_rows(path, check=lambda row: "no b" if row.id == "b" else None)
    assert str(error.value) == f"{path}:2: no b"


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no row"):
        read_rows(write(tmp_path, ""))


def test_every_epoch_uses_every_row_once_in_a_new_order() -> None:
    taken = [row for step in range(14) for row in batch_rows(step, batch_size=5, rows=7, seed=3)]
    epochs = [taken[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batch_rows(3, batch_size=5, rows=7, seed=4) != batch_rows(3, batch_size=5, rows=7, seed=3)


def test_options_and_seed_count_for_games_only(tmp_path: Path) -> None:
    game = {"id": "g", "environment": "FrozenLake", "options": {"size": 4}, "seed": 7}
    quiz = {"id": "q", "prompt": "p", "options": ["a", "b"], "seed": "x", "answer": "a"}
    first, second = read_rows(write(tmp_path, game, quiz), need_answers=True)
    assert (first.environment, first.options, first.seed) == ("FrozenLake", {"size": 4}, 7)
    assert second.options == {}
    with pytest.raises(DataError, match="exactly one of"):
        read_rows(write(tmp_path, {**game, "prompt": "p"}))
