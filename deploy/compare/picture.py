"""The result of a comparison as one SVG file: an accuracy with its interval for each row of the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.report.charts import Interval, interval_chart
from deploy.report.comparison import colour_of
from deploy.report.page import asset, render

PAGE = "\nsvg { font-family: system-ui, sans-serif; background: var(--bg); }\n"
"""Added to the report's style, whose light and dark themes the picture shares."""


def picture(result: Mapping[str, Any]) -> str | None:
    """``compare.svg`` of the content of ``compare.json``: accuracies before training, then the methods.

    Rows without an accuracy or an interval are left out; None if no row is left.
    """
    arms = [one for one in result["arms"].values() if one["runs"]]
    coloured = [(one, "base") for one in result["before"]] + [(one, colour_of(n)) for n, one in enumerate(arms)]
    rows = [
        Interval(one["title"], colour, one["accuracy"], *one["ci95"])
        for one, colour in coloured
        if one["ci95"] is not None
    ]
    chart = interval_chart("Accuracy without the context, 95% intervals", rows)
    return render("chart.svg", chart=chart, style=asset("report.css") + PAGE) if rows else None
