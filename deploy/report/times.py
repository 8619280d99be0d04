"""Time of a run: each step's seconds by the learner's work and waits, and the timeline of one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from deploy.report.charts import Bar, Lane, stacked_bars, timeline
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import duration, fixed, percent, spaced
from deploy.report.parts import Column, Figure, Table, View

MAX_BARS = 48

PARTS = {
    "computing": "learner computes",
    "rollout": "waits for answers",
    "score": "waits for the teacher",
    "queue": "waits, answers queued",
    "sync": "waits for the weight sync",
    "parity": "waits for the parity probe",
    "other": "waits for the loop itself",
}
"""Titles of a step's parts, in the order of the stacks."""

LEARNER_STAGES = ("topk", "accumulate", "step")
"""Stages of the timeline in which the learner computes."""


def parts_of(line: Record) -> dict[str, float]:
    """Seconds of one step by part; they sum to its length. Empty if the line holds no times."""
    total, idle = line.get("time/total_s"), line.get("time/trainer_idle_ratio")
    if not isinstance(total, int | float) or not isinstance(idle, int | float):
        return {}
    waits = {
        key.removeprefix("time/wait_ratio/"): float(value) * total
        for key, value in line.items()
        if key.startswith("time/wait_ratio/") and isinstance(value, int | float)
    }
    return {"computing": total * (1 - idle), **waits}


def times_view(run: RunData) -> View:
    """Stacks of all steps, the timeline of one step, the totals."""
    lines = [(line["step"], parts) for line in run.steps if (parts := parts_of(line))]
    others = sorted({part for _, parts in lines for part in parts} - PARTS.keys())
    seen = [part for part in [*PARTS, *others] if any(parts.get(part, 0) > 0 for _, parts in lines)]
    return {
        "stacks": _stacks(lines, {part: PARTS.get(part, part) for part in seen}) if lines else None,
        "timeline": _timeline(run, {step: sum(parts.values()) for step, parts in lines}),
        "totals": _totals(run),
    }


def _stacks(lines: Sequence[tuple[int, dict[str, float]]], titles: Mapping[str, str]) -> Figure:
    kept = [lines[index] for index in spaced(len(lines), MAX_BARS)]
    bars = [
        Bar(
            f"{step:,}",
            [(stage_class(part), parts.get(part, 0.0)) for part in titles],
            f"step {step}: "
            + ", ".join(f"{title} {duration(parts[part])}" for part, title in titles.items() if parts.get(part)),
        )
        for step, parts in kept
    ]
    label = "Learner time of each step, by work and waits"
    some = "" if len(kept) == len(lines) else f", {len(kept)} of {len(lines)} steps"
    columns = [Column(name, True) for name in ("step", *titles.values(), "total")]
    rows = [
        [step, *(fixed(parts.get(part, 0.0), 2) for part in titles), fixed(sum(parts.values()), 2)]
        for step, parts in kept
    ]
    return Figure(
        "Seconds of each step",
        stacked_bars(label, bars, y_label="seconds"),
        Table(f"{label}, seconds", columns, rows),
        note=f"the learner’s work and waits{some}",
        legend=[(stage_class(part), title) for part, title in titles.items()],
    )


def stage_class(stage: str) -> str:
    """The CSS class that colours a stage."""
    name = "computing" if stage in LEARNER_STAGES else stage
    return f"stage-{name}" if name in PARTS else "stage-other"


# --- one step ---------------------------------------------------------------------------------------------------


def step_lanes(events: Iterable[Record], lengths: Mapping[int, float]) -> tuple[int, float, list[Lane]] | None:
    """(step, seconds, lanes) of the step of median length; None without a timeline.

    `lengths` are seconds by step. A step ends with the parity probe after its weight sync. `events` are iterated twice.
    """
    ends: dict[int, float] = {}
    for _, stage, _, end, args in _spans(events):
        if stage in ("step", "sync", "parity") and isinstance(args.get("version"), int):
            ends[args["version"]] = max(end, ends.get(args["version"], end))
    known = sorted((lengths[version], version) for version in ends if lengths.get(version, 0) > 0)
    if not known:
        return None
    seconds, version = known[len(known) // 2]
    start, end = ends[version] - seconds, ends[version]
    inside: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for track, stage, begun, ended, _ in _spans(events):
        if stage != "queue" and ended > start and begun < end:
            inside.setdefault((track, stage), []).append((max(begun, start) - start, min(ended, end) - start))
    order = sorted(inside, key=lambda lane: (min(inside[lane]), lane))
    return version, seconds, [Lane(t, s, stage_class(s), _merged(inside[t, s])) for t, s in order]


def _spans(events: Iterable[Record]) -> Iterator[tuple[str, str, float, float, Record]]:
    """Yield (track, stage, start, end, args) of each span, times in seconds."""
    names: dict[object, str] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("ph") == "M" and event.get("name") == "process_name":
            names[event.get("pid")] = str(args.get("name"))
        elif event.get("ph") == "X":
            start = float(event["ts"]) / 1e6
            track = names.get(event.get("pid"), "?")
            yield track, str(event["name"]), start, start + float(event["dur"]) / 1e6, args


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _timeline(run: RunData, lengths: Mapping[int, float]) -> Figure | None:
    found = step_lanes(run.events, lengths)
    if found is None:
        return None
    version, seconds, lanes = found
    label = f"Timeline of step {version}, {duration(seconds)} long"
    rows = [
        [
            f"{lane.track} · {lane.stage}",
            fixed(sum(end - start for start, end in lane.spans), 2),
            fixed(lane.spans[0][0], 2),
            fixed(lane.spans[-1][1], 2),
        ]
        for lane in lanes
    ]
    columns = [Column("process · stage"), *(Column(name, True) for name in ("busy", "first start", "last end"))]
    return Figure(
        f"Timeline of step {version}",
        timeline(label, lanes, seconds),
        Table(f"{label}, seconds", columns, rows),
        note="the step of median length; open trace.json in ui.perfetto.dev for all steps",
    )


def _totals(run: RunData) -> Table | None:
    times = run.summary.get("time_s")
    if not isinstance(times, dict):
        return None
    total = times.get("total") or 0.0
    rows = [
        [name, fixed(value, 1), percent(value / total if total else None)]
        for name, value in times.items()
        if isinstance(value, int | float)
    ]
    columns = [Column("stage"), Column("seconds", True), Column("of the run", True)]
    return Table("Seconds of the whole run by stage; stages overlap", columns, rows)
