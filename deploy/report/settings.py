"""What a run was told and what it ran on: configuration, versions, what could not be read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from deploy.report.html import Html, tag
from deploy.report.load_run import Record, RunData
from deploy.report.parts import Column, fold, scroller, section, table

CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")
"""User and password in an address."""


def plain(value: Any) -> str:
    """A configuration's value as one line, without credentials."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return CREDENTIALS.sub("***", text)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings; empty ones are values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def defaults() -> dict[str, Any]:
    """Every key of a configuration that has a default, as YAML would hold it."""
    from common.config.model import Config

    return dict(_defaults(Config, ""))


def _defaults(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
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
    """(key, value, default) of what is not the default; a dash where there is none."""
    known = defaults()
    return [
        (key, plain(value), plain(known[key]) if key in known else "–")
        for key, value in flat(config)
        if key not in known or value != known[key]
    ]


def differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys on which configurations differ, with each one's value; the run's name and folder left out."""
    flats = [dict(flat(config)) for config in configs]
    keys = list(dict.fromkeys(key for one in flats for key in one))
    found = []
    for key in keys:
        values = [plain(one[key]) if key in one else "–" for one in flats]
        if len(set(values)) > 1 and key not in ("run.name", "run.dir"):
            found.append((key, values))
    return found


def settings_section(run: RunData) -> Html:
    """What differs from the defaults, the whole below."""
    if not run.config:
        return section("config", "Configuration", tag("p", "config.yaml is not there.", class_="none"))
    rows = [[key, value, default] for key, value, default in changed(run.config)]
    columns = [Column("key", code=True), Column("value", code=True), Column("default", code=True)]
    whole = CREDENTIALS.sub("***", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    return section(
        "config",
        "Configuration",
        table("What this run was told beyond the defaults", columns, rows),
        fold("The whole configuration, resolved", scroller("The whole configuration", tag("pre", whole))),
    )


def versions(run: RunData) -> dict[str, str]:
    """What the run ran on, by name."""
    packages = run.summary.get("versions")
    environment = run.environment
    found = {key: plain(value) for key, value in flat(environment)}
    if isinstance(packages, dict):
        found |= {str(key): plain(value) for key, value in packages.items() if key != "weights"}
    return found


def versions_section(run: RunData) -> Html:
    """Packages, machine, commit; and what the report had to do without."""
    found: Record = versions(run)
    notes = (
        tag("div", tag("h3", "What could not be read"), tag("ul", [tag("li", note) for note in run.notes]))
        if run.notes
        else None
    )
    body = (
        table(
            "Versions",
            [Column("what"), Column("version", code=True)],
            [[k, v] for k, v in found.items()],
            hide_caption=True,
        )
        if found
        else tag("p", "No versions were written down.", class_="none")
    )
    return section("versions", "Versions", body, notes)
