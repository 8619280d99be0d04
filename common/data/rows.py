"""Rows of a data set: reading, validation before any model loads, and the order of training."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from common.config.model import DataConfig
from common.data.columns import (
    CONTEXT_COLUMNS,
    MappingError,
    close_column,
    joined,
    map_columns,
    nan_to_none,
    unused_columns,
    without_nulls,
)
from common.data.sources import DataError, InvalidJson, is_file, read_records

__all__ = ["DataDigest", "DataError", "Message", "Row", "batch_rows", "iterate_rows", "read_rows", "rows_from"]

REPORTED_FAULTS = 20
FORMS = ("prompt", "messages", "environment")
"""Columns of which a row has exactly one."""
_ONE_FORM = "exactly one of `prompt`, `messages` and `environment` is needed"


class Message(BaseModel):
    """One turn of a conversation, in the form that transformers' chat templates take.

    An assistant's turn may call tools, ``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` each; a
    turn of role `tool` holds the result of a call.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: tuple[dict[str, Any], ...] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    """Name of the tool whose result the turn holds."""

    @model_validator(mode="before")
    @classmethod
    def _arguments_are_mappings(cls, value: Any) -> Any:
        """Replace arguments that are JSON text, as OpenAI's API writes them, by their values."""
        if not isinstance(value, dict) or not isinstance(value.get("tool_calls"), list | tuple):
            return value
        return {**value, "tool_calls": [_with_parsed_arguments(call) for call in value["tool_calls"]]}

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"tool_calls belong to the assistant, not to the {self.role}")
        if (self.name is not None or self.tool_call_id is not None) and self.role != "tool":
            raise ValueError(f"`name` and `tool_call_id` belong to role `tool`, not to `{self.role}`")
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content: Field required")
        for call in self.tool_calls or ():
            function = call.get("function")
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise ValueError('a tool call is {"type": "function", "function": {"name": ..., "arguments": {...}}}')
        return self

    def as_dict(self) -> dict[str, Any]:
        """The turn as a chat template takes it; absent fields are left out."""
        found = self.model_dump(exclude_none=True)
        if "tool_calls" in found:
            found["tool_calls"] = list(found["tool_calls"])
        return found


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


class Row(BaseModel):
    """One row: raw text (`prompt`), a conversation that ends with the user (`messages`) or a game (`environment`).

    Unknown columns are ignored.
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
    context: Annotated[str, Field(pattern=r"\S")] | None = None
    """Text that only the teacher sees, placed as ``context.placement`` says."""
    teacher_messages: Annotated[tuple[Message, ...], Field(min_length=1)] | None = None
    """The teacher's chat in place of `messages`; the student's answer follows it too."""
    tools: tuple[dict[str, Any], ...] | None = None
    """JSON schemas of the tools that the chat template describes, to both sides."""

    _source: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of the source, and those of the row by their own names; empty unless `read_rows` kept them."""
        return {**self._source, **self.model_dump(exclude_none=True)} if self._source else {}

    @property
    def has_own_context(self) -> bool:
        """True if the teacher sees something of this row that the student does not."""
        return self.context is not None or self.teacher_messages is not None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if all(value.get(form) is None for form in FORMS):
            for form in FORMS:
                if (close := close_column(value, form)) is not None and close != form:
                    raise ValueError(
                        f"{_ONE_FORM}; unknown column {close!r}, did you mean {form!r}? data.columns maps a column"
                    )
        if value.get("environment") is None:  # other data sets use these names for other things
            value = {name: column for name, column in value.items() if name not in ("options", "seed")}
        if value.get("messages") is None:  # nothing describes tools in a raw prompt, and an environment has its own
            value = {name: column for name, column in value.items() if name != "tools"}
        if isinstance(value.get("tools"), str):
            value = {**value, "tools": _parsed_tools(value["tools"])}
        number = value.get("id")
        if isinstance(number, int | float) and not isinstance(number, bool) and number == int(number):
            value = {**value, "id": str(int(number))}
        return {**value, "context": joined(value["context"])} if "context" in value else value

    @model_validator(mode="after")
    def _one_form(self) -> Row:
        if sum(getattr(self, form) is not None for form in FORMS) != 1:
            raise ValueError(_ONE_FORM)
        for messages in (self.messages, self.teacher_messages):
            if messages is not None:
                _check_roles([message.role for message in messages])
        if self.teacher_messages is not None and self.messages is None:
            raise ValueError("`teacher_messages` needs `messages`; for raw text and games use `context`")
        if self.tools is not None and self.prompt is not None:
            raise ValueError("`tools` needs `messages`: a raw prompt has no chat template that describes them")
        if self.teacher_messages is not None and self.context is not None:
            raise ValueError("a row has `context` or `teacher_messages`, not both")
        return self


def _parsed_tools(text: str) -> Any:
    """Return the schemas that a data set stores as JSON text; other text stays, and is refused as no list."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _check_roles(roles: Sequence[str]) -> None:
    if roles[-1] not in ("user", "tool"):
        raise ValueError(f"the last message must be the user's or a tool's, it is the {roles[-1]}'s")
    if "user" not in roles:
        raise ValueError("one message must be the user's")
    if "system" in roles[1:]:
        raise ValueError("a system message can only be the first")


def read_rows(source: Path, mapping: DataConfig | None = None, **options: Any) -> list[Row]:
    """Return all rows of a source; `options` are those of `iterate_rows`."""
    return list(iterate_rows(source, mapping, **options))


def iterate_rows(
    source: Path,
    mapping: DataConfig | None = None,
    *,
    need_answers: bool = False,
    own_contexts: bool = False,
    keep_columns: bool = False,
    check: Callable[[Row], str | None] = lambda row: None,
    unused: dict[str, str] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a source (`common.data.sources`), with columns mapped by `mapping`; blank lines are skipped.

    With `own_contexts` the columns `CONTEXT_COLUMNS` belong to a row, else they are unused. `keep_columns` keeps all
    columns of the source for `Row.columns`. `check` returns a further
    fault of a row, or None. `unused` receives each column that no row uses, with the column that its name resembles
    and that the row lacks, else "".

    Raises DataError, after the last row, with one ``location: reason`` line per bad row (the first 20), for a repeated
    id, for an unreadable or empty source, and, with `need_answers`, for a row without an answer (games need none).
    """
    faults: list[str] = []
    seen: dict[str, str] = {}
    known_layouts: set[tuple[str, ...]] = set()
    used = Row.model_fields.keys() - (() if own_contexts else set(CONTEXT_COLUMNS))
    for location, record in read_records(source):
        row = _parse(record, mapping, used)
        fault = row if isinstance(row, str) else _fault(row, record, seen, need_answers) or check(row)
        if fault is not None:
            faults.append(f"{location}: {fault}")
        elif isinstance(row, Row):
            seen[row.id] = location
            if keep_columns:
                row._source = record
            if unused is not None and mapping is not None and (layout := tuple(map(str, record))) not in known_layouts:
                known_layouts.add(layout)
                _note_unused(unused, unused_columns(layout, mapping, used), row)
            yield row
    if faults:
        more = [f"... and {len(faults) - REPORTED_FAULTS} more"] if len(faults) > REPORTED_FAULTS else []
        raise DataError("\n".join(faults[:REPORTED_FAULTS] + more))
    if not seen:
        raise DataError(f"{source} holds no rows")


def _note_unused(unused: dict[str, str], names: Sequence[str], row: Row) -> None:
    """Add the unused columns of a row to `unused`, each with the absent column of a row that its name resembles."""
    absent = [name for name in ("answer", "teacher") if getattr(row, name) is None]
    for name in names:
        unused[name] = next((column for column in absent if close_column([name], column)), "")


class DataDigest:
    """sha256 of the training data: the file's bytes, or its rows if the source is no file or has mapped columns."""

    def __init__(self, data: DataConfig) -> None:
        mapped = data.mix or data.columns or data.user_template or data.teacher_template or data.labels
        self._file = data.train if is_file(data.train) and not mapped else None
        self._content = hashlib.sha256()
        if data.mix:
            self._add({name: one.share for name, one in data.mix.items()})

    def each(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield `rows`, each added to the digest."""
        for row in rows:
            if self._file is None:
                self._content.update(row.model_dump_json().encode() + b"\n")
                if row.columns:  # a function may read any of them
                    self._add(row.columns)
            yield row

    def hexdigest(self) -> str:
        """The digest in hex."""
        if self._file is None:
            return self._content.hexdigest()
        with self._file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _add(self, value: Any) -> None:
        self._content.update(json.dumps(value, default=str).encode() + b"\n")


def _parse(record: Any, mapping: DataConfig | None, used: Collection[str]) -> Row | str:
    if isinstance(record, InvalidJson):
        return str(record)
    if not isinstance(record, dict):
        hint = "; a file of JSON lines holds one row a line, no array" if isinstance(record, list) else ""
        return f"expected an object with the columns of one row, got {type(record).__name__}{hint}"
    try:
        record = nan_to_none(record)
        columns = map_columns(record, mapping) if mapping else record
        known = {name: value for name, value in columns.items() if name in used or name not in Row.model_fields}
        return Row.model_validate(without_nulls(known))
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


def _fault(row: Row, record: Mapping[str, Any], seen: dict[str, str], need_answers: bool) -> str | None:
    if row.id in seen:
        return f"id {row.id!r} was already used at {seen[row.id]}"
    if need_answers and row.answer is None and row.environment is None:
        close = close_column(record, "answer")
        hint = f"; it has a column {close!r}: data.columns={{answer: {close}}}" if close not in (None, "answer") else ""
        return f"row {row.id!r} has no `answer` to grade against{hint}"
    return None


def batch_rows(step: int, *, batch_size: int, rows: int, seed: int) -> list[int]:
    """Return the row indices of optimiser step `step` (from 0): epoch after epoch, each in its own seeded order.

    A function of the step alone, so a resumed run needs no data cursor.
    """
    return rows_from(step * batch_size, batch_size, rows=rows, seed=seed)


def rows_from(start: int, count: int, *, rows: int, seed: int) -> list[int]:
    """Return `count` row indices from position `start` of this order on."""
    return list(itertools.islice(_walk(start, rows, seed), count))


def _walk(start: int, rows: int, seed: int) -> Iterator[int]:
    epoch, offset = divmod(start, rows)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield from (int(index) for index in order[offset:])
        epoch, offset = epoch + 1, 0
