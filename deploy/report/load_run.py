"""Loads a run's folder without writing to it. Missing or damaged files become notes, not errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.telemetry.trace import TraceEvents

Record = dict[str, Any]

STEP_MARK = "kl/lower_bound"
"""The metric that every training step's line of ``metrics.jsonl`` has; other lines are evaluations."""


class ReportError(ValueError):
    """The folder is no run's folder."""


@dataclass(frozen=True)
class RunData:
    """The content of a run's folder.

    `steps` (one for each step) and `evaluations` (one for each step and set) come from ``metrics.jsonl``, ordered by
    step; the last line written counts. `contexts` are the texts that `tokens` name, `questions` the held-out prompts
    by row. `notes` name the files that could not be read.
    """

    name: str
    folder: Path
    config: Record
    summary: Record
    environment: Record
    steps: list[Record]
    evaluations: list[Record]
    samples: list[Record]
    tokens: list[Record]
    contexts: dict[str, str]
    questions: dict[str, str]
    events: Iterable[Record]
    """Events of the timeline, read from the file at each iteration."""
    notes: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """The outcome in ``summary.json``; ``unfinished`` without one: the run is going on, or was killed."""
        return str(self.summary.get("outcome", "unfinished"))


def read_run(folder: Path) -> RunData:
    """Read a run's folder. Raises ReportError if `folder` holds none of a run's files."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise ReportError(
            f"{folder} is no run's folder: it holds neither config.yaml nor metrics.jsonl nor summary.json"
        )
    reader = _Reader(folder)
    config = reader.yaml("config.yaml")
    lines = reader.lines("metrics.jsonl")
    texts = reader.lines("texts.jsonl", optional=True)
    return RunData(
        name=_name(config, folder),
        folder=folder,
        config=config,
        summary=reader.json("summary.json"),
        environment=reader.json("environment.json", optional=True),
        steps=_by_step(line for line in lines if STEP_MARK in line),
        evaluations=_by_step_and_set(lines),
        samples=reader.lines("samples.jsonl"),
        tokens=reader.lines("tokens.jsonl", optional=True),
        contexts={str(line["context"]): str(line.get("text", "")) for line in texts if "context" in line},
        questions={str(line["row"]): str(line.get("text", "")) for line in texts if "row" in line},
        events=reader.events("trace.json"),
        notes=reader.notes,
    )


def _name(config: Record, folder: Path) -> str:
    section = config.get("run")
    return str(section["name"] if isinstance(section, dict) and "name" in section else folder.resolve().name)


class _Reader:
    """Reads files of one folder; `notes` collects missing and damaged ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.notes: list[str] = []

    def _text(self, name: str, optional: bool) -> str | None:
        try:
            return (self._folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            if not optional:
                self.notes.append(f"{name} is missing")
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {error.strerror}")
        return None

    def json(self, name: str, *, optional: bool = False) -> Record:
        """Read a JSON object; empty if the file is missing or damaged."""
        text = self._text(name, optional)
        if text is None:
            return {}
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        return self._object(name, found)

    def yaml(self, name: str) -> Record:
        """Read a YAML mapping; empty if the file is missing or damaged."""
        text = self._text(name, False)
        if text is None:
            return {}
        try:
            found = yaml.safe_load(text)
        except yaml.YAMLError:
            found = None
        return self._object(name, found)

    def _object(self, name: str, found: Any) -> Record:
        if isinstance(found, dict):
            return found
        self.notes.append(f"{name} is damaged")
        return {}

    def lines(self, name: str, *, optional: bool = False) -> list[Record]:
        """Read the objects of a JSON-lines file; a damaged line, as a crash leaves at the end, becomes a note."""
        text = self._text(name, optional)
        found: list[Record] = []
        damaged = 0
        for line in (text or "").split("\n"):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                found.append(value)
            else:
                damaged += 1
        if damaged:
            self.notes.append(f"{name}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
        return found

    def events(self, name: str) -> Iterable[Record]:
        """Return the events of a timeline, which may be cut anywhere."""
        path = self._folder / name
        return TraceEvents(path) if path.is_file() else []


def _by_step(lines: Iterator[Record]) -> list[Record]:
    found = {line["step"]: line for line in lines if isinstance(line.get("step"), int)}
    return [found[step] for step in sorted(found)]


def _by_step_and_set(lines: list[Record]) -> list[Record]:
    found: dict[tuple[int, str], Record] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("accuracy/") and isinstance(line.get("step"), int) and isinstance(value, int | float):
                name = key.removeprefix("accuracy/")
                found[line["step"], name] = {"step": line["step"], "set": name, "accuracy": float(value)}
    return [found[key] for key in sorted(found)]
