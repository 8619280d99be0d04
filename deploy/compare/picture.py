"""The result of a comparison as a picture: an accuracy with its interval for each row of the table; one SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.report.charts import Interval, interval_chart
from deploy.report.comparison import COLOURS
from deploy.report.html import Html
from deploy.report.page import asset

PAGE = "\nsvg { font-family: system-ui, sans-serif; background: var(--bg); }\n"
"""What a picture that stands alone adds to the style of the report, whose dark theme it has too."""


def picture(result: Mapping[str, Any]) -> Html | None:
    """``compare.svg`` of the content of ``compare.json``: what was known before, then the methods, as in the table.

    Rows without an accuracy, or without an interval to it, are not drawn; None where that leaves nothing.
    """
    arms = [one for one in result["arms"].values() if one["runs"]]
    drawn = [(one, "base") for one in result["before"]] + [(one, f"s{n % COLOURS}") for n, one in enumerate(arms)]
    rows = [
        Interval(one["title"], colour, one["accuracy"], *one["ci95"])
        for one, colour in drawn
        if one["ci95"] is not None
    ]
    return standing_alone(interval_chart("Accuracy without the context, 95% intervals", rows)) if rows else None


def standing_alone(chart: Html) -> Html:
    """A chart of the report as a file of its own."""
    assert chart.startswith("<svg ")
    opening, rest = chart.split(">", 1)
    style = asset("report.css") + PAGE
    assert "]]>" not in style
    return Html(f'{opening} xmlns="http://www.w3.org/2000/svg"><style><![CDATA[{style}]]></style>{rest}\n')
