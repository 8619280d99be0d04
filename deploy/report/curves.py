"""Curves over the steps: divergence, accuracy, and the numbers that say whether a run is well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.report.charts import Series, line_chart
from deploy.report.html import Html, tag
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import number, spaced
from deploy.report.parts import Column, figure, legend, section, table

MOST_ROWS = 40
"""Of the table behind a curve: ``metrics.jsonl`` has every step."""

ACCURACY = {
    "student": "without context, held-out (before and after)",
    "teacher": "with context",
    "valid": "without context, validation",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric by its name in ``metrics.jsonl``."""

    metric: str
    title: str
    note: str


WELL = (
    Curve("loss", "Loss", "what is minimised, a token"),
    Curve("entropy", "Entropy of the student", "nats a token"),
    Curve("grad_norm", "Gradient norm", "before clipping"),
    Curve("rollout/mean_tokens", "Length of answers", "tokens"),
    Curve("rollout/stopped_by_length", "Answers cut by length", "share"),
    Curve("tokens_per_s", "Speed", "the student's tokens trained a second"),
    Curve("staleness/mean_age", "Staleness", "mean age of trained tokens, steps"),
    Curve("support_coverage", "Coverage of the support", "student’s mass on the stored ids"),
    Curve("mismatch/rms", "Engine against learner", "rms of the log-prob, nats"),
    Curve("env/success", "Games won", "share of the episodes trained on"),
)
"""Smaller charts, each shown where the run has the metric."""


def points(lines: Sequence[Record], metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric; a value that is no number becomes NaN, a gap."""
    return [
        (float(line["step"]), float(value) if isinstance(value, int | float) else math.nan)
        for line in lines
        if (value := line.get(metric)) is not None
    ]


def curves_section(run: RunData) -> Html:
    """KL and accuracy large, the rest small."""
    kl = line_chart(
        "Reverse KL of student and teacher by step", [Series("KL", "student", points(run.steps, "kl/lower_bound"))]
    )
    small = [
        figure(
            curve.title,
            line_chart(f"{curve.title} by step", [Series(curve.title, "plain", found)], height=170),
            curve_table(curve.title, [(curve.title, found)]),
            note=curve.note,
        )
        for curve in WELL
        if (found := points(run.steps, curve.metric))
    ]
    return section(
        "curves",
        "Curves",
        tag(
            "div",
            figure(
                "KL",
                kl,
                curve_table(
                    "KL by step",
                    [(name, points(run.steps, f"kl/{name}")) for name in ("lower_bound", "support", "tail")],
                ),
                note="student to teacher, nats a token, on the step’s own answers",
            ),
            accuracy_figure(run),
            class_="pair",
        ),
        tag("div", small, class_="grid") if small else None,
    )


def accuracy_series(run: RunData) -> list[Series]:
    """Accuracy by step of what was evaluated: before and after as one line, validation, the teacher as a level."""
    by_set: dict[str, list[tuple[float, float]]] = {}
    for line in run.evaluations:
        by_set.setdefault(line["set"], []).append((float(line["step"]), line["accuracy"]))
    ends = sorted([*by_set.get("base", []), *by_set.get("final", [])])
    last = max([float(line["step"]) for line in (*run.steps, *run.evaluations)], default=0.0)
    level = [(step, value) for _, value in by_set.get("in_context", [])[:1] for step in (0.0, last)]
    found = [
        Series(ACCURACY["student"], "student", ends),
        Series(ACCURACY["teacher"], "teacher", level),
        Series(ACCURACY["valid"], "valid", by_set.get("valid", [])),
    ]
    return [one for one in found if one.points]


def accuracy_figure(run: RunData) -> Html:
    """Accuracy over the run."""
    series = accuracy_series(run)
    return figure(
        "Accuracy",
        line_chart("Accuracy by step", series, y_range=(0.0, 1.0)),
        curve_table("Accuracy by step", [(one.name, one.points) for one in series]) if series else None,
        note="of held-out answers",
        keys=legend([(one.colour, one.name) for one in series]) if series else None,
    )


def curve_table(caption: str, columns: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> Html:
    """The numbers of curves, at most `MOST_ROWS` steps of them."""
    values = [dict(found) for _, found in columns]
    steps = sorted({step for found in values for step in found})
    kept = [steps[index] for index in spaced(len(steps), MOST_ROWS)]
    rows = [[f"{step:g}", *(number(found.get(step), 4) for found in values)] for step in kept]
    title = caption if len(kept) == len(steps) else f"{caption} ({len(kept)} of {len(steps)} steps)"
    return table(title, [Column("step", True), *(Column(name, True) for name, _ in columns)], rows)
