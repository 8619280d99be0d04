"""Mapping of a source's records to the columns of a row: renames, user template, labels. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config.model import DataConfig
from common.data.templates import fill, placeholders


class MappingError(ValueError):
    """A record lacks a column or label that `data.columns`, `data.user_template` or `data.labels` needs."""


def map_columns(record: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """Return `record` with the columns of a row; columns without a mapping stay unchanged.

    Raises MappingError, with key and column, for a missing column and for an answer without a label.
    """
    row = dict(record)
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
    if data.labels and type(answer) is int:
        if not 0 <= answer < len(data.labels):
            raise MappingError(f"answer {answer} has no label: data.labels has {len(data.labels)}")
        row["answer"] = data.labels[answer]
    elif isinstance(answer, int | float) and not isinstance(answer, bool):
        row["answer"] = str(answer)
    return row


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
