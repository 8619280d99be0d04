"""The stages' files, JSON lines under ``runs/NAME/experience/``: each stage reads the file of the stage before it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config.model import ConfigError, RunConfig

SOLVED, EXTRACTED = "solved.jsonl", "extracted.jsonl"
POOL, SCORES, SELECTED = "pool.jsonl", "scores.jsonl", "selected.jsonl"


def experience_folder(run: RunConfig) -> Path:
    """Return the folder of the stages' files."""
    return run.path / "experience"


class StageFile:
    """The results of a stage that can be resumed: one per line, after a first line with the inputs they depend on.

    Every line is flushed when written. A last line that a crash truncated is dropped when the file is opened again.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        """Open or create the file. Raises ConfigError, naming the differences, if other inputs made it."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        lines = list(_complete_lines(path)) if path.exists() else []
        if lines:
            _refuse_other_inputs(path, lines[0], inputs)
            self.rows = lines[1:]
        write_lines(path, [inputs, *self.rows])
        self._stream = path.open("a", encoding="utf-8")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append results."""
        for row in rows:
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.rows.append(row)
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_stage(path: Path, stage: str) -> list[dict[str, Any]]:
    """Return the results in the file of `stage`. Raises ConfigError, naming the command to run, if there are none."""
    rows = list(_complete_lines(path))[1:] if path.exists() else []
    if not rows:
        raise ConfigError(f"{path} is missing or empty: run `opcd experience {stage}` first")
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole file of JSON lines, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def _complete_lines(path: Path) -> Iterable[dict[str, Any]]:
    *lines, _truncated = path.read_text(encoding="utf-8").split("\n")
    yield from map(json.loads, lines)  # the last is empty, or a crash truncated it


def _refuse_other_inputs(path: Path, before: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(inputs))  # tuples become lists, as in the file
    differences = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigError(
            f"{path} was made from other inputs: {'; '.join(differences)}. Remove the file to make it anew, or choose "
            "another run.name"
        )
