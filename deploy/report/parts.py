"""What pages are put together from: sections, figures with the table behind them, tables, legends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.report.html import Child, Html, tag


def section(identity: str, title: str, *children: Child, lead: Child = None) -> Html:
    """A part of the page under a heading of its own, which the table of contents links to."""
    return tag(
        "section",
        tag("h2", title, id=f"{identity}-title"),
        None if lead is None else tag("p", lead, class_="lead"),
        children,
        id=identity,
        aria_labelledby=f"{identity}-title",
        tabindex=-1,
    )


@dataclass(frozen=True, slots=True)
class Column:
    """A column by its heading; numbers stand right, their digits aligned."""

    heading: str
    numeric: bool = False
    code: bool = False


def table(
    caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Child]], *, hide_caption: bool = False
) -> Html:
    """A table whose first column names its rows; it scrolls by itself where the window is narrow."""
    head = tag("tr", [tag("th", c.heading, scope="col", class_="num" if c.numeric else None) for c in columns])
    body = [
        tag(
            "tr",
            [
                tag("th", cell, scope="row", class_=_class(column))
                if index == 0
                else tag("td", cell, class_=_class(column))
                for index, (column, cell) in enumerate(zip(columns, row, strict=True))
            ],
        )
        for row in rows
    ]
    whole = tag(
        "table",
        tag("caption", caption, class_="hidden" if hide_caption else None),
        tag("thead", head),
        tag("tbody", body),
    )
    return scroller(caption, whole)


def _class(column: Column) -> str | None:
    return "num" if column.numeric else "code" if column.code else None


def scroller(label: str, *children: Child) -> Html:
    """A box that scrolls sideways by itself; the keyboard reaches it."""
    return tag("div", children, class_="scroller", role="region", aria_label=label, tabindex=0)


def figure(
    title: str, chart: Html, behind: Html | None = None, *, note: Child = None, keys: Html | None = None
) -> Html:
    """A chart under its title, the numbers behind it folded below."""
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), None if note is None else tag("span", note, class_="note")),
        chart,
        keys,
        tag("p", class_="readout", aria_live="polite") if "data-series" in chart else None,
        None if behind is None else fold(f"Numbers: {title}", behind),
    )


def fold(title: Child, *children: Child, opened: bool = False, class_: str | None = None) -> Html:
    """Something that is shown when asked for."""
    return tag("details", tag("summary", title), children, open=opened, class_=class_)


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """(class, name) of each colour of a chart."""
    return tag(
        "ul",
        [tag("li", tag("span", class_=f"swatch {colour}", aria_hidden="true"), name) for colour, name in entries],
        class_="legend",
    )


def facts(pairs: Sequence[tuple[str, Child]]) -> Html:
    """Names and values as a definition list."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_="facts")
