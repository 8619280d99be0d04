"""What a stage has done so far, as JSON lines: the next stage reads it, and the same stage goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config.model import ConfigError


class StageFile:
    """A file whose first line says what its lines were made of; each line after it is one result.

    Every line is flushed as it is written. A last line that a crash cut short is dropped when the file is opened again.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming what differs, where the file is there and was made of something else."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(_whole_lines(path)) if path.exists() else []
        if lines:
            _refuse_other(path, lines[0], dict(made_of))
            self.rows = lines[1:]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [dict(made_of), *self.rows])
        _replace(path, text)
        self._stream = path.open("a", encoding="utf-8")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Results, kept from now on."""
        for row in rows:
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.rows.append(row)
        self._stream.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()


def read_stage(path: Path, made_by: str) -> list[dict[str, Any]]:
    """The results in a stage's file. Raises ConfigError, naming the command that makes it, where there are none."""
    rows = list(_whole_lines(path))[1:] if path.exists() else []
    if not rows:
        raise ConfigError(f"{path} is not there or empty: run `opcd experience {made_by}` first")
    return rows


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole file of JSON lines, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
    yield from map(json.loads, lines)  # the last is empty, or was being written when the process died


def _refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # As JSON has it: a tuple comes back as a list.
    wanted = json.loads(json.dumps(now))
    different = [
        f"{name} was {before.get(name)!r} and is {wanted.get(name)!r}"
        for name in {**before, **wanted}
        if before.get(name) != wanted.get(name)
    ]
    if different:
        raise ConfigError(
            f"{path} was made otherwise: {'; '.join(different)}. Remove it to make it anew, or choose another run.name"
        )
