"""Values that the building blocks of a page (``templates/parts.html``) show: tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.report.charts import Chart

View = dict[str, Any]
"""Variables of a section's template."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. Numbers are aligned on the right."""

    heading: str
    numeric: bool = False
    code: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first cell of each row names the row."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    hide_caption: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with the table of its numbers. `legend` holds a (colour class, name) for each colour."""

    title: str
    chart: Chart
    table: Table | None = None
    note: str | None = None
    legend: Sequence[tuple[str, str]] = ()
