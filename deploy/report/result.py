"""The headline: how much of the context's benefit moved into the weights, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deploy.report.charts import Interval, interval_chart
from deploy.report.html import Child, Html, join, tag
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import MISSING, duration, fixed, percent
from deploy.report.parts import Column, facts, figure, section, table

LABELS = {
    "base": ("Student before, without context", "base"),
    "in_context": ("With context (teacher)", "teacher"),
    "final": ("Student after, without context", "student"),
}
"""What the three accuracies of a run are called, and the class that colours them."""


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


def measured(summary: Record) -> list[Measured]:
    """Every accuracy of a summary: the run's three first, then whatever else was measured in the same form."""
    keys = [*LABELS, *(key for key in summary if key not in LABELS)]
    return [found for key in keys for found in _measured(key, summary.get(key))]


def _measured(key: str, value: Any) -> Iterator[Measured]:
    if not isinstance(value, dict):
        return
    interval = _interval(value.get("ci95"))
    if interval is None or not _is_number(value.get("accuracy")):
        return
    label, colour = LABELS.get(key, (key.replace("_", " ").capitalize(), "other"))
    yield Measured(key, label, colour, value["accuracy"], *interval, int(value.get("n", 0)))


def gap_interval(summary: Record) -> tuple[float, float] | None:
    """The gap's 95% interval, where the run could say it."""
    return _interval(summary.get("gap_closed_ci95"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_number(end) for end in value):
        return None
    return value[0], value[1]


def headline(run: RunData) -> Html:
    """The first thing on the page: one number and a sentence."""
    gap = run.summary.get("gap_closed")
    if not _is_number(gap):
        return tag("p", tag("strong", _without_gap(run)), class_="headline")
    interval = gap_interval(run.summary)
    return tag(
        "div",
        tag("p", "Gap closed", class_="note"),
        tag("p", percent(gap, 1), class_="big"),
        tag(
            "p",
            "of the accuracy that the context adds is in the student’s weights",
            None
            if interval is None
            else join(
                " ", tag("span", f"(95 % interval {percent(interval[0])} to {percent(interval[1])})", class_="note")
            ),
            ".",
        ),
        class_="headline",
    )


def _without_gap(run: RunData) -> str:
    found = {one.key: one.accuracy for one in measured(run.summary)}
    if not run.summary:
        return "No summary yet: the run goes on, or was killed."
    if len(found.keys() & LABELS.keys()) == len(LABELS):
        return "The context changes nothing on the held-out rows: there was no gap to close."
    missing = [LABELS[key][0].lower() for key in LABELS if key not in found]
    return f"No gap to state; not measured: {'; '.join(missing)}."


def result_section(run: RunData) -> Html:
    """Headline, the accuracies with their intervals, the run's facts."""
    rows = measured(run.summary)
    summary = run.summary
    outcome, _, reason = run.outcome.partition(": ")
    best = summary.get("best_on_valid")
    chosen = (
        f"step {best.get('step')}, accuracy {fixed(best.get('accuracy'), 3)}" if isinstance(best, dict) else MISSING
    )
    pairs: list[tuple[str, Child]] = [
        ("Outcome", outcome),
        ("Steps", _steps(run)),
        ("KL, first to last step", _kl(summary)),
        ("Best on valid", chosen),
        ("Duration", duration(_seconds(summary))),
        ("Largest engine–learner difference", _nats(summary.get("parity_max_nats"))),
    ]
    chart = (
        figure(
            "Held-out accuracy",
            interval_chart(
                "Held-out accuracy: " + "; ".join(f"{one.label} {percent(one.accuracy)}" for one in rows),
                [Interval(one.label, one.colour, one.accuracy, one.low, one.high) for one in rows],
            ),
            accuracy_table(rows),
            note="dots, with 95 % intervals",
        )
        if rows
        else None
    )
    top = tag("div", tag("div", headline(run), facts(pairs)), chart, class_="split")
    why = tag("p", reason, class_="reason") if reason else None  # may be long: it has the page's whole width
    return section("result", "Result", why, top, forgetting_table(summary))


def forgetting_table(summary: Record) -> Html | None:
    """What became of other tasks and of texts; None where the run looked at none."""
    rows: list[list[Child]] = []
    for kind, unit in (("ood", "accuracy"), ("perplexity", "nats a token")):
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
    return table("What was forgotten: without the context, before and after", columns, rows) if rows else None


def _figure(value: Any) -> str:
    """An accuracy by its figure, a number by itself."""
    return fixed(value.get("accuracy") if isinstance(value, dict) else value, 3)


def accuracy_table(rows: list[Measured]) -> Html:
    """The same as numbers."""
    columns = [Column("measured"), Column("accuracy", True), Column("95 % interval", True), Column("rows", True)]
    cells: list[list[Child]] = [
        [one.label, fixed(one.accuracy, 3), f"{fixed(one.low, 3)} to {fixed(one.high, 3)}", one.n] for one in rows
    ]
    return table("Held-out accuracy", columns, cells, hide_caption=True)


def _kl(summary: Record) -> str:
    ends = [summary.get(name) for name in ("kl_first", "kl_last")]
    if not all(map(_is_number, ends)):
        return MISSING
    return f"{fixed(ends[0], 3)} to {fixed(ends[1], 3)} nats a token"


def _steps(run: RunData) -> str:
    planned = run.config.get("learner", {}).get("steps") if isinstance(run.config.get("learner"), dict) else None
    done = run.summary.get("steps", len(run.steps))
    return f"{done} of {planned}" if planned is not None else str(done)


def _seconds(summary: Record) -> float | None:
    times = summary.get("time_s")
    found = times.get("total") if isinstance(times, dict) else None
    return found if isinstance(found, int | float) else None


def _nats(value: Any) -> str:
    return f"{value:.1e} nats" if _is_number(value) else MISSING
