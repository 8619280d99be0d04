"""The headline: the share of the context's benefit that moved into the weights, with its interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.report.charts import Interval, interval_chart
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import MISSING, duration, fixed, is_number, percent
from deploy.report.parts import Column, Figure, Table, View

LABELS = {
    "base": ("Student before, without context", "base"),
    "in_context": ("With context (teacher)", "teacher"),
    "final": ("Student after, without context", "student"),
}
"""(label, colour class) of the three accuracies of a run."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One accuracy of ``summary.json``."""

    key: str
    label: str
    colour: str
    accuracy: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> Interval:
        """The row of an interval chart."""
        return Interval(self.label, self.colour, self.accuracy, self.low, self.high)


def measured(summary: Record) -> list[Measured]:
    """Every accuracy of a summary: the three of `LABELS` first, then others of the same form."""
    keys = [*LABELS, *(key for key in summary if key not in LABELS)]
    return [found for key in keys for found in _measured(key, summary.get(key))]


def _measured(key: str, value: Any) -> Iterator[Measured]:
    if not isinstance(value, dict):
        return
    interval = _interval(value.get("ci95"))
    if interval is None or not is_number(value.get("accuracy")):
        return
    label, colour = LABELS.get(key, (key.replace("_", " ").capitalize(), "other"))
    yield Measured(key, label, colour, value["accuracy"], *interval, int(value.get("n", 0)))


def gap(summary: Record) -> tuple[str | None, str | None]:
    """(gap closed, its 95% interval) as texts; None if the run did not measure it."""
    value, interval = summary.get("gap_closed"), _interval(summary.get("gap_closed_ci95"))
    return (
        percent(value) if is_number(value) else None,
        None if interval is None else f"{percent(interval[0])} to {percent(interval[1])}",
    )


def total_seconds(summary: Record) -> float | None:
    """Duration of the run; None if the summary lacks it."""
    times = summary.get("time_s")
    found = times.get("total") if isinstance(times, dict) else None
    return found if isinstance(found, int | float) else None


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
        return None
    return value[0], value[1]


def _without_gap(summary: Record) -> str:
    found = {one.key for one in measured(summary)}
    if not summary:
        return "No summary yet: the run is going on, or was killed."
    missing = [label.lower() for key, (label, _) in LABELS.items() if key not in found]
    if not missing:
        return "The context changes nothing on the held-out rows: there was no gap to close."
    return f"No gap to state; not measured: {'; '.join(missing)}."


def result_view(run: RunData) -> View:
    """Headline, the accuracies with their intervals, the run's facts."""
    summary = run.summary
    outcome, _, reason = run.outcome.partition(": ")
    best, parity = summary.get("best_on_valid"), summary.get("parity_max_nats")
    closed, interval = gap(summary)
    return {
        "reason": reason,
        "gap_closed": closed,
        "gap_interval": interval,
        "without_gap": _without_gap(summary),
        "facts": [
            ("Outcome", outcome),
            ("Steps", _steps(run)),
            ("KL, first to last step", _kl(summary)),
            (
                "Best on valid",
                f"step {best.get('step')}, accuracy {fixed(best.get('accuracy'), 3)}"
                if isinstance(best, dict)
                else MISSING,
            ),
            ("Duration", duration(total_seconds(summary))),
            ("Largest engine–learner difference", f"{parity:.1e} nats" if is_number(parity) else MISSING),
        ],
        "accuracy": _accuracy(measured(summary)),
        "forgetting": _forgetting(summary),
    }


def _accuracy(rows: list[Measured]) -> Figure | None:
    if not rows:
        return None
    label = "Held-out accuracy: " + "; ".join(f"{one.label} {percent(one.accuracy)}" for one in rows)
    columns = [Column("measured"), Column("accuracy", True), Column("95 % interval", True), Column("rows", True)]
    cells = [[one.label, fixed(one.accuracy, 3), f"{fixed(one.low, 3)} to {fixed(one.high, 3)}", one.n] for one in rows]
    return Figure(
        "Held-out accuracy",
        interval_chart(label, [one.interval for one in rows]),
        Table("Held-out accuracy", columns, cells, hide_caption=True),
        note="dots, with 95 % intervals",
    )


def _forgetting(summary: Record) -> Table | None:
    """Changes on other tasks and on texts; None if the run measured none."""
    rows = []
    for kind, unit in (("ood", "accuracy"), ("perplexity", "nats per token")):
        found = summary.get(kind)
        for name, one in found.items() if isinstance(found, dict) else ():
            if isinstance(one, dict):
                interval = _interval(one.get("ci95"))
                ends = MISSING if interval is None else f"{fixed(interval[0], 3)} to {fixed(interval[1], 3)}"
                before, after = (_figure(one.get(when)) for when in ("before", "after"))
                rows.append([f"{name}, {unit}", before, after, fixed(one.get("change"), 3), ends])
    columns = [
        Column("other task or text"),
        *(Column(name, True) for name in ("before", "after", "change", "95 % interval")),
    ]
    return Table("Forgetting: without the context, before and after training", columns, rows) if rows else None


def _figure(value: Any) -> str:
    """The accuracy of an evaluation, or a plain number."""
    return fixed(value.get("accuracy") if isinstance(value, dict) else value, 3)


def _kl(summary: Record) -> str:
    first, last = summary.get("kl_first"), summary.get("kl_last")
    if not (is_number(first) and is_number(last)):
        return MISSING
    return f"{fixed(first, 3)} to {fixed(last, 3)} nats per token"


def _steps(run: RunData) -> str:
    learner = run.config.get("learner")
    planned = learner.get("steps") if isinstance(learner, dict) else None
    done = run.summary.get("steps", len(run.steps))
    return f"{done} of {planned}" if planned is not None else str(done)
