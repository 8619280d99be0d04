"""Rows of a data set, read from JSON lines and checked before anything heavy starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

REPORTED_FAULTS = 20


class DataError(ValueError):
    """Rows that cannot be used: one line each, with file and line number."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Row(BaseModel):
    """One prompt: raw text (`prompt`), a conversation that ends with the user (`messages`) or a game (`environment`).

    Other columns are left alone, except ones that look like a misspelt name of these.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, Field(min_length=1)]
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    environment: Annotated[str, Field(min_length=1)] | None = None
    """Name of an environment, or ``package.module:Class``; `options` and `seed` are read beside it only."""
    options: dict[str, Any] = {}
    """Arguments of the environment's constructor."""
    seed: int = 0
    """Of the episode: where it begins."""
    answer: str | None = None
    teacher: str | None = None
    """Which of the run's `teachers` scores it, default: `teacher`."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        for name in value:
            close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.8)
            if name not in cls.model_fields and close:
                raise ValueError(f"unknown column {name!r}; did you mean {close[0]!r}?")
        if value.get("environment") is None:  # in other data sets these names mean something else
            value = {name: column for name, column in value.items() if name not in ("options", "seed")}
        # Numeric ids are as common as text ones.
        return {**value, "id": str(value["id"])} if type(value.get("id")) is int else value

    @model_validator(mode="after")
    def _one_form(self) -> Row:
        forms = (self.prompt, self.messages, self.environment)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("exactly one of `prompt`, `messages` and `environment` is needed")
        if self.messages is not None:
            roles = [message.role for message in self.messages]
            if roles[-1] != "user":
                raise ValueError(f"the last message must be the user's, it is the {roles[-1]}'s")
            if "system" in roles[1:]:
                raise ValueError("a system message can only be the first")
        return self


def read_rows(
    path: Path, *, need_answers: bool = False, check: Callable[[Row], str | None] = lambda row: None
) -> list[Row]:
    """All rows of a JSON-lines file; blank lines are skipped. `check` says what else is wrong with a row.

    Raises DataError with ``file:line: reason`` for every bad row (the first 20), for a repeated id, for a file that
    cannot be read or holds no row, and, with `need_answers`, for a row without an answer (a game needs none).
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    rows: list[Row] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = _parse(line)
        fault = row if isinstance(row, str) else _fault(row, seen, need_answers) or check(row)
        if fault is not None:
            faults.append(f"{path}:{number}: {fault}")
        elif isinstance(row, Row):
            seen[row.id] = number
            rows.append(row)
    if faults:
        more = [f"... and {len(faults) - REPORTED_FAULTS} more"] if len(faults) > REPORTED_FAULTS else []
        raise DataError("\n".join(faults[:REPORTED_FAULTS] + more))
    if not rows:
        raise DataError(f"{path} holds no row")
    return rows


def _parse(line: str) -> Row | str:
    try:
        return Row.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        return f"not JSON: {error}"
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        message = str(detail["msg"]).removeprefix("Value error, ")
        return f"{place}: {message}" if place else message


def _fault(row: Row, seen: dict[str, int], need_answers: bool) -> str | None:
    if row.id in seen:
        return f"id {row.id!r} was already used on line {seen[row.id]}"
    if need_answers and row.answer is None and row.environment is None:
        return f"row {row.id!r} has no `answer` to grade against"
    return None


def batch_rows(step: int, *, batch_size: int, rows: int, seed: int) -> list[int]:
    """Indices of the rows of optimiser step `step` (from 0): epoch after epoch, each in a seeded order of its own.

    A function of the step alone, so the data cursor of a resumed run is its step.
    """
    return [index for _, index in zip(range(batch_size), _walk(step * batch_size, rows, seed), strict=False)]


def _walk(start: int, rows: int, seed: int) -> Iterator[int]:
    epoch, offset = divmod(start, rows)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield from (int(index) for index in order[offset:])
        epoch, offset = epoch + 1, 0
