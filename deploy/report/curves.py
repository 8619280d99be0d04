"""Curves over the steps: divergence, accuracy, and the health metrics of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deploy.report.charts import Series, line_chart
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import Point, number, spaced
from deploy.report.parts import Column, Figure, Table, View

MAX_ROWS = 40
"""Rows in the table of a curve; ``metrics.jsonl`` has every step."""

ACCURACY = {
    "student": "without context, held-out (before and after)",
    "teacher": "with context",
    "valid": "without context, validation",
}

HEALTH = (
    ("loss", "Loss", "per token"),
    ("entropy", "Entropy of the student", "nats per token"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("lr", "Learning rate", "of the step"),
    ("rollout/teacher_share", "Responses of the teacher", "share of the step’s"),
    ("reward/mean", "Reward", "mean of the step’s responses"),
    ("teacher/age", "Age of the teacher", "steps since its weights, mean"),
    ("rollout/mean_tokens", "Length of answers", "tokens"),
    ("rollout/stopped_by_length", "Answers cut by length", "share"),
    ("rollout/commonest_answer", "Prompts with one and the same answer", "share"),
    ("tokens_per_s", "Speed", "trained response tokens per second"),
    ("staleness/mean_age", "Staleness", "mean age of trained tokens, steps"),
    ("support_coverage", "Coverage of the support", "student’s mass on the stored ids"),
    ("mismatch/rms", "Engine–learner mismatch", "rms of the log-prob difference, nats"),
    ("env/success", "Games won", "share of the trained episodes"),
)
"""(metric, title, note) of the small charts; each is shown if the run has the metric."""


def points(lines: Sequence[Record], metric: str) -> list[Point]:
    """(step, value) of a metric; a value that is no number becomes NaN, a gap."""
    return [
        (float(line["step"]), float(value) if isinstance(value, int | float) else math.nan)
        for line in lines
        if (value := line.get(metric)) is not None
    ]


def curves_view(run: RunData) -> View:
    """KL and accuracy as large charts, health metrics as small ones."""
    kl = points(run.steps, "kl/lower_bound")
    parts = [(name, points(run.steps, f"kl/{name}")) for name in ("lower_bound", "support", "tail")]
    return {
        "large": [
            Figure(
                "KL",
                line_chart("Reverse KL of student and teacher by step", [Series("KL", "student", kl)]),
                curve_table("KL by step", parts),
                note="student to teacher, nats per token, on the step’s own answers",
            ),
            accuracy_figure(run),
        ],
        "small": [
            Figure(
                title,
                line_chart(f"{title} by step", [Series(title, "plain", found)], height=170),
                curve_table(title, [(title, found)]),
                note=note,
            )
            for metric, title, note in HEALTH
            if (found := points(run.steps, metric))
        ],
    }


def accuracy_figure(run: RunData) -> Figure:
    """Accuracy by step: before and after as one line, validation, and the accuracy with context as a level."""
    by_set: dict[str, list[Point]] = {}
    for line in run.evaluations:
        by_set.setdefault(line["set"], []).append((float(line["step"]), line["accuracy"]))
    last = max([float(line["step"]) for line in (*run.steps, *run.evaluations)], default=0.0)
    lines = {
        "student": sorted([*by_set.get("base", []), *by_set.get("final", [])]),
        "teacher": [(step, value) for _, value in by_set.get("in_context", [])[:1] for step in (0.0, last)],
        "valid": by_set.get("valid", []),
    }
    series = [Series(ACCURACY[colour], colour, found) for colour, found in lines.items() if found]
    return Figure(
        "Accuracy",
        line_chart("Accuracy by step", series, y_range=(0.0, 1.0)),
        curve_table("Accuracy by step", [(one.name, one.points) for one in series]) if series else None,
        note="of held-out answers",
        legend=[(one.colour, one.name) for one in series],
    )


def curve_table(caption: str, curves: Sequence[tuple[str, Sequence[Point]]]) -> Table:
    """The values of (name, points) curves at up to `MAX_ROWS` steps."""
    values = [dict(found) for _, found in curves]
    steps = sorted({step for found in values for step in found})
    kept = [steps[index] for index in spaced(len(steps), MAX_ROWS)]
    rows = [[f"{step:g}", *(number(found.get(step), 4) for found in values)] for step in kept]
    title = caption if len(kept) == len(steps) else f"{caption} ({len(kept)} of {len(steps)} steps)"
    return Table(title, [Column("step", True), *(Column(name, True) for name, _ in curves)], rows)
