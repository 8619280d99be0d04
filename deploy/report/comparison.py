"""Several runs on one page: summaries in a table, curves over each other, differences of the configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deploy.report.charts import Series, interval_chart, line_chart
from deploy.report.curves import curve_table, points
from deploy.report.load_run import RunData
from deploy.report.numbers import MISSING, Point, duration, fixed
from deploy.report.page import page
from deploy.report.parts import Column, Figure, Table
from deploy.report.result import gap, measured, total_seconds
from deploy.report.settings import differences

SECTIONS = (("summaries", "Summaries"), ("curves", "Curves"), ("differences", "Differences"))

COLOURS = 8
"""Number of colour classes, ``s0`` and so on; further runs reuse them."""

CURVES: tuple[tuple[str, str, str], ...] = (
    ("kl/lower_bound", "KL", "nats per token"),
    ("loss", "Loss", "per token"),
    ("tokens_per_s", "Speed", "trained response tokens per second"),
    ("rollout/mean_tokens", "Length of answers", "tokens"),
    ("entropy", "Entropy of the student", "nats per token"),
    ("staleness/mean_age", "Staleness", "mean age of trained tokens, steps"),
)
"""(metric, title, note) of each chart; it is shown if a run has the metric."""


def labels(runs: Sequence[RunData]) -> list[str]:
    """A label for each run: its name, with its folder if another run has the same name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({run.folder})" for name, run in zip(names, runs, strict=True)]


def comparison_page(runs: Sequence[RunData]) -> str:
    """Render the page of several runs."""
    names = labels(runs)
    overlays = [
        (title, note, [points(run.steps, metric) for run in runs])
        for metric, title, note in CURVES
        if any(points(run.steps, metric) for run in runs)
    ]
    validation = [points([line for line in run.evaluations if line["set"] == "valid"], "accuracy") for run in runs]
    found = differences([run.config for run in runs])
    return page(
        "comparison.html",
        f"{len(runs)} runs",
        ", ".join(names),
        SECTIONS,
        summaries=_summaries(runs, names),
        accuracy=_accuracy(runs, names),
        legend=[(colour_of(index), name) for index, name in enumerate(names)],
        curves=[
            _overlay(names, *overlay) for overlay in (*overlays, ("Validation accuracy", "without context", validation))
        ],
        differences=Table(
            "Keys on which the configurations differ",
            [Column(name, code=True) for name in ("key", *names)],
            [[key, *values] for key, values in found],
        ),
    )


def colour_of(index: int) -> str:
    """The colour class of a run by its position."""
    return f"s{index % COLOURS}"


def _summaries(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    numbers = ("gap closed", "95 % interval", "before", "with context", "after", "rows", "steps", "last KL", "duration")
    columns = [Column("run"), Column("outcome"), *(Column(name, True) for name in numbers)]
    return Table("Summaries of the runs", columns, [_summary(name, run) for name, run in zip(names, runs, strict=True)])


def _summary(name: str, run: RunData) -> list[Any]:
    summary, found = run.summary, {one.key: one for one in measured(run.summary)}
    closed, interval = gap(summary)
    return [
        name,
        run.outcome.partition(":")[0],
        closed or MISSING,
        interval or MISSING,
        *(fixed(found[key].accuracy, 3) if key in found else MISSING for key in ("base", "in_context", "final")),
        found["final"].n if "final" in found else MISSING,
        summary.get("steps", len(run.steps)),
        fixed(summary.get("kl_last"), 3),
        duration(total_seconds(summary)),
    ]


def _accuracy(runs: Sequence[RunData], names: Sequence[str]) -> Figure | None:
    after = [
        replace(one.interval, label=name, colour=colour_of(index))
        for index, (name, run) in enumerate(zip(names, runs, strict=True))
        for one in measured(run.summary)
        if one.key == "final"
    ]
    chart = interval_chart("Held-out accuracy after training", after)
    return Figure("Accuracy after training, without context", chart) if after else None


def _overlay(names: Sequence[str], title: str, note: str, curves: Sequence[list[Point]]) -> Figure:
    named = list(zip(names, curves, strict=True))
    lines = [Series(name, colour_of(index), curve) for index, (name, curve) in enumerate(named)]
    label = f"{title} by step"
    return Figure(title, line_chart(label, lines), curve_table(label, named), note=note)
