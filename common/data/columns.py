"""Mapping of a source's records to the columns of a row: renames, templates, labels, missing values. Pure."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from common.config.model import DataConfig
from common.data.templates import fill, placeholders

CONTEXT_COLUMNS = ("context", "teacher_messages")
"""Columns that hold a row's own context."""
_LIKE_A_CONTEXT = re.compile(r"context|privileged|demonstration|teacher_(prompt|messages)")


class MappingError(ValueError):
    """A record lacks a column or label that `data.columns`, a template or `data.labels` needs."""


def map_columns(record: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """Return `record` with the columns of a row; columns without a mapping stay unchanged.

    Raises MappingError, with key and column, for a missing column and for an answer without a label.
    """
    row = {name: value for name, value in record.items() if name not in data.ignore}
    for name in data.columns.values():
        row.pop(name, None)  # a source's `prompt` that becomes `messages` must not remain as `prompt`
    for column, name in data.columns.items():
        row[column] = _find(record, name, f"data.columns.{column}")
    if data.user_template is not None:
        names = placeholders(data.user_template)
        values = {name: _text(record, name, "data.user_template") for name in names}
        row.pop("prompt", None)
        row["messages"] = [{"role": "user", "content": fill(data.user_template, values)}]
    if data.teacher_template is not None:
        _fill_teacher_template(row, record, data.teacher_template)
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        row["answer"] = _text_of_number(answer, data.labels)
    return row


def _fill_teacher_template(row: dict[str, Any], record: Mapping[str, Any], template: str) -> None:
    """Set `teacher_messages` of a chat row: its messages with the filled template as the last user turn."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], Mapping):
        raise MappingError("data.teacher_template makes the teacher's last user turn: the row needs `messages`")
    values = {"prompt": str(messages[-1].get("content"))}
    for name in placeholders(template) - values.keys():
        values[name] = _text(record, name, "data.teacher_template")
    row["teacher_messages"] = [*messages[:-1], {**messages[-1], "content": fill(template, values)}]
    row.pop("context", None)


def joined(value: Any) -> Any:
    """Join a list of texts with line ends; return any other value unchanged."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    return value


def unused_columns(names: Iterable[str], data: DataConfig, used: Collection[str]) -> list[str]:
    """Return the columns of a source that neither a row, which has the columns `used`, nor a template reads."""
    read = {name.partition(".")[0] for name in data.columns.values()} | set(data.columns.values())
    for template in (data.user_template, data.teacher_template):
        read |= {part for name in placeholders(template or "") for part in (name, name.partition(".")[0])}
    return [name for name in names if name not in read and name not in used and name not in data.ignore]


def looks_like_context(name: str) -> bool:
    """True for names that other programs give to the text that only the teacher sees."""
    return _LIKE_A_CONTEXT.search(name.lower()) is not None


def close_column(names: Iterable[str], wanted: str) -> str | None:
    """Return the name that may be a misspelt `wanted`; None if there is none."""
    return next(iter(difflib.get_close_matches(wanted, map(str, names), n=1, cutoff=0.8)), None)


def _text_of_number(answer: float, labels: Sequence[str]) -> str:
    """Return a numeric answer as text, or its label. Tables turn whole numbers into floats beside a missing value."""
    if not math.isfinite(answer):
        raise MappingError(f"answer {answer} is not a number that can be graded")
    number = int(answer) if answer == int(answer) else answer
    if not labels or isinstance(number, float):
        return str(number)
    if not 0 <= number < len(labels):
        raise MappingError(f"answer {number} has no label: data.labels has {len(labels)}")
    return labels[number]


def nan_to_none(value: Any) -> Any:
    """Replace NaN by None, in nested values too: tables store a missing value as either."""
    if isinstance(value, dict):
        return {name: one if type(one) is str else nan_to_none(one) for name, one in value.items()}
    if isinstance(value, list):
        return [one if type(one) is str else nan_to_none(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def without_nulls(value: Any) -> Any:
    """Leave out None values of mappings, in nested values too: Arrow gives every struct every field."""
    if isinstance(value, dict):
        return {name: one if type(one) is str else without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _text(record: Mapping[str, Any], name: str, key: str) -> str:
    """Return the value of a placeholder as text. Raises MappingError for a missing value."""
    value = joined(_find(record, name, key))
    if value is None:
        raise MappingError(f"{key}: column {name!r} has no value in this row")
    return str(value)


def _find(record: Mapping[str, Any], name: str, key: str) -> Any:
    """Return the column `name`, or the nested value at that dotted path."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise MappingError(f"{key}: there is no column {name!r}, only {', '.join(map(str, record))}")
        value = value[part]
    return value
