"""Configuration, versions and unreadable files of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from common.config.model import Config
from deploy.report.load_run import RunData
from deploy.report.numbers import MISSING
from deploy.report.parts import Column, Table, View

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""User and password in a URL."""


def plain(value: Any) -> str:
    """A configuration value as one line, without credentials."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return CREDENTIALS.sub("***", text)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _defaults(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, default as YAML holds it) of every key that has a default."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _defaults(kind, f"{prefix}{name}.")
        elif not field.is_required():
            yield f"{prefix}{name}", _as_yaml(field.get_default())


def _as_yaml(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_yaml(one) for one in value]
    return value if isinstance(value, bool | int | float | dict) or value is None else str(value)


def changed(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, value, default) of each key that differs from its default; a dash for a key without one."""
    defaults = dict(_defaults(Config))
    return [
        (key, plain(value), plain(defaults[key]) if key in defaults else MISSING)
        for key, value in flat(config)
        if key not in defaults or value != defaults[key]
    ]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, values) of each key on which configurations differ, except the run's name and folder."""
    flats = [dict(flat(config)) for config in configs]
    found = []
    for key in dict.fromkeys(key for one in flats for key in one):
        values = [plain(one[key]) if key in one else MISSING for one in flats]
        if len(set(values)) > 1 and key not in ("run.name", "run.dir"):
            found.append((key, values))
    return found


def config_view(run: RunData) -> View:
    """The keys that differ from their defaults, and the whole configuration."""
    columns = [Column(name, code=True) for name in ("key", "value", "default")]
    return {
        "changed": Table("Keys that differ from their defaults", columns, changed(run.config)) if run.config else None,
        "whole": CREDENTIALS.sub("***", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)),
    }


def versions_view(run: RunData) -> View:
    """Packages, machine, commit, and notes on files that could not be read."""
    found = {key: plain(value) for key, value in flat(run.environment)}
    packages = run.summary.get("versions")
    if isinstance(packages, dict):
        found |= {str(key): plain(value) for key, value in packages.items() if key != "weights"}
    columns = [Column("part"), Column("version", code=True)]
    return {
        "table": Table("Versions", columns, list(found.items()), hide_caption=True) if found else None,
        "notes": run.notes,
    }
