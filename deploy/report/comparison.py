"""Several runs side by side: curves over each other, summaries in a table, what their configurations differ in."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.report.charts import Interval, Series, interval_chart, line_chart
from deploy.report.curves import curve_table, points
from deploy.report.html import Child, Html, tag
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import MISSING, duration, fixed, percent
from deploy.report.page import page
from deploy.report.parts import Column, figure, legend, section, table
from deploy.report.result import gap_interval, measured
from deploy.report.settings import differences

SECTIONS = (("summaries", "Summaries"), ("curves", "Curves"), ("differences", "Differences"))

COLOURS = 8
"""Lines that have a colour of their own, ``s0`` and so on; further runs take them again."""

CURVES: tuple[tuple[str, str, str], ...] = (
    ("kl/lower_bound", "KL", "nats a token"),
    ("loss", "Loss", "a token"),
    ("tokens_per_s", "Speed", "the student's tokens trained a second"),
    ("rollout/mean_tokens", "Length of answers", "tokens"),
    ("entropy", "Entropy of the student", "nats a token"),
    ("staleness/mean_age", "Staleness", "mean age of trained tokens, steps"),
)


def labels(runs: Sequence[RunData]) -> list[str]:
    """A name for each run: its own, with its folder where two are called the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({run.folder})" for name, run in zip(names, runs, strict=True)]


def comparison_page(runs: Sequence[RunData]) -> Html:
    """The page of several runs."""
    names = labels(runs)
    return page(
        f"{len(runs)} runs",
        ", ".join(names),
        SECTIONS,
        (_summaries(runs, names), _curves(runs, names), _differences(runs, names)),
    )


def _summaries(runs: Sequence[RunData], names: Sequence[str]) -> Html:
    columns = [
        Column("run"),
        Column("outcome"),
        Column("gap closed", True),
        Column("95 % interval", True),
        Column("before", True),
        Column("with context", True),
        Column("after", True),
        Column("rows", True),
        Column("steps", True),
        Column("last KL", True),
        Column("duration", True),
    ]
    rows = [_summary(name, run) for name, run in zip(names, runs, strict=True)]
    after = [
        Interval(name, f"s{index % COLOURS}", one.accuracy, one.low, one.high)
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
        for one in measured(run.summary)
        if one.key == "final"
    ]
    chart = (
        figure("Accuracy after, without context", interval_chart("Held-out accuracy after training", after))
        if after
        else None
    )
    return section("summaries", "Summaries", table("Summaries of the runs", columns, rows), chart)


def _summary(name: str, run: RunData) -> list[Child]:
    summary, found = run.summary, {one.key: one for one in measured(run.summary)}
    gap, interval = summary.get("gap_closed"), gap_interval(summary)
    times = summary.get("time_s")
    shown = [fixed(found[key].accuracy, 3) if key in found else MISSING for key in ("base", "in_context", "final")]
    return [
        name,
        run.outcome.partition(":")[0],
        percent(gap if isinstance(gap, int | float) else None),
        MISSING if interval is None else f"{percent(interval[0])} to {percent(interval[1])}",
        *shown,
        found["final"].n if "final" in found else MISSING,
        summary.get("steps", len(run.steps)),
        fixed(summary.get("kl_last"), 3),
        duration(times.get("total") if isinstance(times, dict) else None),
    ]


def _curves(runs: Sequence[RunData], names: Sequence[str]) -> Html:
    keys = legend([(f"s{index % COLOURS}", name) for index, name in enumerate(names)])
    figures = [
        _overlay(names, title, note, [points(run.steps, metric) for run in runs])
        for metric, title, note in CURVES
        if any(points(run.steps, metric) for run in runs)
    ]
    accuracy = _overlay(names, "Validation accuracy", "without context", [_validation(run) for run in runs])
    return section("curves", "Curves", keys, tag("div", figures, accuracy, class_="grid"))


def _validation(run: RunData) -> list[tuple[float, float]]:
    lines: list[Record] = [line for line in run.evaluations if line["set"] == "valid"]
    return points(lines, "accuracy")


def _overlay(names: Sequence[str], title: str, note: str, curves: Sequence[list[tuple[float, float]]]) -> Html:
    lines = [
        Series(name, f"s{index % COLOURS}", curve)
        for index, (name, curve) in enumerate(zip(names, curves, strict=True))
    ]
    behind = curve_table(f"{title} by step", list(zip(names, curves, strict=True)))
    return figure(title, line_chart(f"{title} by step", lines), behind, note=note)


def _differences(runs: Sequence[RunData], names: Sequence[str]) -> Html:
    found = differences([run.config for run in runs])
    columns = [Column("key", code=True), *(Column(name, code=True) for name in names)]
    body = (
        table("Keys on which the configurations differ", columns, [[key, *values] for key, values in found])
        if found
        else tag("p", "The configurations are the same but for names.", class_="none")
    )
    return section("differences", "Differences", body)
