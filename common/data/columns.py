"""Records of foreign data as our columns: renamed, filled into a user turn, labels instead of numbers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config.model import DataConfig
from common.data.templates import fill, places


class MappingError(ValueError):
    """A record that lacks what `data.columns`, `data.user_template` or `data.labels` ask of it."""


def mapped(record: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """`record` with the columns of a row, as `data` says. What is not renamed stays as it is.

    Raises MappingError, naming key and column, for a column that is not there, and for an answer without a label.
    """
    row = dict(record)
    for name in data.columns.values():
        row.pop(name, None)  # the data's `prompt`, if that is to be our `messages`, is no `prompt` any more
    for column, name in data.columns.items():
        row[column] = _find(record, name, f"data.columns.{column}")
    if data.user_template is not None:
        named = places(data.user_template)
        values = {name: str(_find(record, name, "data.user_template")) for name in named}
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
    """Column `name`, or the one that dots lead to."""
    if name in record:
        return record[name]
    found: Any = record
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise MappingError(f"{key}: there is no column {name!r}, only {', '.join(map(str, record))}")
        found = found[part]
    return found
