"""Rows of a data set, read from where they are and checked before anything heavy starts."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.config.model import DataConfig
from common.data.columns import MappingError, mapped
from common.data.sources import DataError, NotJson, is_file, read_records

__all__ = ["DataError", "Message", "Row", "batch_rows", "digest", "read_rows"]

REPORTED_FAULTS = 20


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
    source: Path,
    mapping: DataConfig | None = None,
    *,
    need_answers: bool = False,
    check: Callable[[Row], str | None] = lambda row: None,
) -> list[Row]:
    """All rows of a source (`common.data.sources`), columns renamed and filled in as `mapping` says; blank lines are
    skipped. `check` says what else is wrong with a row.

    Raises DataError with ``place: reason`` for every bad row (the first 20), for a repeated id, for a source that
    cannot be read or holds no row, and, with `need_answers`, for a row without an answer (a game needs none).
    """
    rows: list[Row] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for place, record in read_records(source):
        row = _parse(record, mapping)
        fault = row if isinstance(row, str) else _fault(row, seen, need_answers) or check(row)
        if fault is not None:
            faults.append(f"{place}: {fault}")
        elif isinstance(row, Row):
            seen[row.id] = place
            rows.append(row)
    if faults:
        more = [f"... and {len(faults) - REPORTED_FAULTS} more"] if len(faults) > REPORTED_FAULTS else []
        raise DataError("\n".join(faults[:REPORTED_FAULTS] + more))
    if not rows:
        raise DataError(f"{source} holds no row")
    return rows


def digest(data: DataConfig, rows: Sequence[Row]) -> str:
    """sha256 of what is trained on: the file as it stands, or the `rows` of what is not simply a file."""
    if is_file(data.train) and not (data.columns or data.user_template or data.labels):
        return hashlib.sha256(data.train.read_bytes()).hexdigest()
    content = hashlib.sha256()
    for row in rows:
        content.update(row.model_dump_json().encode() + b"\n")
    return content.hexdigest()


def _parse(record: Any, mapping: DataConfig | None) -> Row | str:
    if isinstance(record, NotJson):
        return str(record)
    try:
        return Row.model_validate(mapped(record, mapping) if mapping and isinstance(record, dict) else record)
    except MappingError as error:
        return str(error)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(str(part) for part in detail["loc"])
        message = str(detail["msg"]).removeprefix("Value error, ")
        return f"{place}: {message}" if place else message


def _fault(row: Row, seen: dict[str, str], need_answers: bool) -> str | None:
    if row.id in seen:
        return f"id {row.id!r} was already used at {seen[row.id]}"
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
