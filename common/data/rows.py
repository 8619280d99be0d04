"""Rows of a data set: reading, validation before any model loads, and the order of training."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.config.model import DataConfig
from common.data.columns import MappingError, map_columns
from common.data.sources import DataError, InvalidJson, is_file, read_records

__all__ = ["DataError", "Message", "Row", "batch_rows", "digest", "read_rows"]

REPORTED_FAULTS = 20


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Row(BaseModel):
    """One row: raw text (`prompt`), a conversation that ends with the user (`messages`) or a game (`environment`).

    Unknown columns are ignored, unless they look like a misspelt name of a known one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, Field(min_length=1)]
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    environment: Annotated[str, Field(min_length=1)] | None = None
    """Name of an environment, or ``package.module:Class``. `options` and `seed` count only together with it."""
    options: dict[str, Any] = {}
    """Arguments of the environment's constructor."""
    seed: int = 0
    """Seed of the episode's start."""
    answer: str | None = None
    teacher: str | None = None
    """Name of the teacher that scores the row. Default: the `teacher` section."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        for name in value:
            close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.8)
            if name not in cls.model_fields and close:
                raise ValueError(f"unknown column {name!r}; did you mean {close[0]!r}?")
        if value.get("environment") is None:  # other data sets use these names for other things
            value = {name: column for name, column in value.items() if name not in ("options", "seed")}
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
    """Read all rows of a source (`common.data.sources`), with columns mapped by `mapping`; blank lines are skipped.

    `check` returns a further fault of a row, or None. Raises DataError with one ``location: reason`` line per bad row
    (the first 20), for a repeated id, for an unreadable or empty source, and, with `need_answers`, for a row without an
    answer (games need none).
    """
    rows: list[Row] = []
    faults: list[str] = []
    seen: dict[str, str] = {}
    for location, record in read_records(source):
        row = _parse(record, mapping)
        fault = row if isinstance(row, str) else _fault(row, seen, need_answers) or check(row)
        if fault is not None:
            faults.append(f"{location}: {fault}")
        elif isinstance(row, Row):
            seen[row.id] = location
            rows.append(row)
    if faults:
        more = [f"... and {len(faults) - REPORTED_FAULTS} more"] if len(faults) > REPORTED_FAULTS else []
        raise DataError("\n".join(faults[:REPORTED_FAULTS] + more))
    if not rows:
        raise DataError(f"{source} holds no rows")
    return rows


def digest(data: DataConfig, rows: Sequence[Row]) -> str:
    """Hex sha256 of the training data: the file's bytes, or `rows` if the source is no file or has mapped columns."""
    if is_file(data.train) and not (data.columns or data.user_template or data.labels):
        return hashlib.sha256(data.train.read_bytes()).hexdigest()
    content = hashlib.sha256()
    for row in rows:
        content.update(row.model_dump_json().encode() + b"\n")
    return content.hexdigest()


def _parse(record: Any, mapping: DataConfig | None) -> Row | str:
    if isinstance(record, InvalidJson):
        return str(record)
    try:
        return Row.model_validate(map_columns(record, mapping) if mapping and isinstance(record, dict) else record)
    except MappingError as error:
        return str(error)
    except ValidationError as error:
        detail = error.errors()[0]
        column = ".".join(str(part) for part in detail["loc"])
        message = str(detail["msg"]).removeprefix("Value error, ")
        return f"{column}: {message}" if column else message


def _fault(row: Row, seen: dict[str, str], need_answers: bool) -> str | None:
    if row.id in seen:
        return f"id {row.id!r} was already used at {seen[row.id]}"
    if need_answers and row.answer is None and row.environment is None:
        return f"row {row.id!r} has no `answer` to grade against"
    return None


def batch_rows(step: int, *, batch_size: int, rows: int, seed: int) -> list[int]:
    """Return the row indices of optimiser step `step` (from 0): epoch after epoch, each in its own seeded order.

    A function of the step alone, so a resumed run needs no data cursor.
    """
    return [index for _, index in zip(range(batch_size), _walk(step * batch_size, rows, seed), strict=False)]


def _walk(start: int, rows: int, seed: int) -> Iterator[int]:
    epoch, offset = divmod(start, rows)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield from (int(index) for index in order[offset:])
        epoch, offset = epoch + 1, 0
