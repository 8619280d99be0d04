"""Mapping of a source's records to the columns of a row: renames, user template, labels, missing values. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.config.model import DataConfig
from common.data.templates import fill, placeholders


class MappingError(ValueError):
    """A record lacks a column or label that `data.columns`, `data.user_template` or `data.labels` needs."""


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
        values = {name: str(_find(record, name, "data.user_template")) for name in names}
        row.pop("prompt", None)
        row["messages"] = [{"role": "user", "content": fill(data.user_template, values)}]
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        row["answer"] = _text_of_number(answer, data.labels)
    return row


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
    if isinstance(value, Mapping):
        return {name: nan_to_none(one) for name, one in value.items()}
    if isinstance(value, list):
        return [nan_to_none(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def without_nulls(value: Any) -> Any:
    """Leave out None values of mappings, in nested values too: Arrow gives every struct every field."""
    if isinstance(value, Mapping):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


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
