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
from common.data.columns import MappingError, map_columns, nan_to_none, without_nulls
from common.data.sources import DataError, InvalidJson, is_file, read_records

__all__ = ["DataError", "Message", "Row", "batch_rows", "digest", "read_rows"]

REPORTED_FAULTS = 20
FORMS = ("prompt", "messages", "environment")
"""Columns of which a row has exactly one."""


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
            return value
        if value.get("environment") is None:  # other data sets use these names for other things
            value = {name: column for name, column in value.items() if name not in ("options", "seed")}
        absent = cls._absent(value)
        for name in value:
            close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.8)
            if name not in cls.model_fields and close and close[0] in absent:
                raise ValueError(
                    f"unknown column {name!r}; did you mean {close[0]!r}? data.columns maps a column, data.ignore "
                    "leaves one out"
                )
        number = value.get("id")
        if isinstance(number, int | float) and not isinstance(number, bool) and number == int(number):
            value = {**value, "id": str(int(number))}
        return value

    @classmethod
    def _absent(cls, value: dict[str, Any]) -> set[str]:
        """Names of columns that the row lacks: another column with such a name may be a misspelling."""
        absent = {name for name in cls.model_fields if value.get(name) is None}
        return absent - set(FORMS) if any(value.get(form) is not None for form in FORMS) else absent

    @model_validator(mode="after")
    def _one_form(self) -> Row:
        if sum(getattr(self, form) is not None for form in FORMS) != 1:
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
        with data.train.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    content = hashlib.sha256()
    for row in rows:
        content.update(row.model_dump_json().encode() + b"\n")
    return content.hexdigest()


def _parse(record: Any, mapping: DataConfig | None) -> Row | str:
    if isinstance(record, InvalidJson):
        return str(record)
    if not isinstance(record, dict):
        hint = "; a file of JSON lines holds one row a line, no array" if isinstance(record, list) else ""
        return f"expected an object with the columns of one row, got {type(record).__name__}{hint}"
    try:
        record = nan_to_none(record)
        return Row.model_validate(without_nulls(map_columns(record, mapping) if mapping else record))
    except MappingError as error:
        return str(error)
    except ValidationError as error:
        return _explain(error.errors()[0])


def _explain(detail: Any) -> str:
    """Return pydantic's first fault of a row as text, with the remedy for common forms of other formats."""
    location, given = detail["loc"], detail["input"]
    column = ".".join(str(part) for part in location)
    if location == ("prompt",) and isinstance(given, list):
        return "prompt: a list of messages, not text: set data.columns to {messages: prompt}"
    if location[-1:] == ("content",) and isinstance(given, list):
        return f"{column}: a list of parts, not text: join the texts of the parts; opcd trains on text alone"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "literal_error":
        message += f", not {given!r}"
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
