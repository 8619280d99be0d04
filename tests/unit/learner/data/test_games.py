"""Rows with an environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.data.rows import DataError, read_rows
from learner.data.games import environment_error


def test_environments_are_tried_when_rows_are_read(tmp_path: Path) -> None:
    rows = (
        {"id": "a", "environment": "FrozenLake"},
        {"id": "b", "environment": "FrozenLaek"},
        {"id": "c", "environment": "FrozenLake", "options": {"sizes": 3}},
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as error:
        read_rows(path, check=environment_error)
    unknown, options = str(error.value).splitlines()
    assert unknown.startswith(f"{path}:2: unknown environment")
    assert options.startswith(f"{path}:3: ")
    assert "sizes" in options
