"""Where the time went: each step's seconds by what the learner did or waited for, and the timeline of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploy.report.charts import Bar, Lane, stacked_bars, timeline
from deploy.report.html import Child, Html, tag
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import duration, fixed, percent, spaced
from deploy.report.parts import Column, figure, legend, scroller, section, table

MOST_BARS = 48

PARTS = {
    "computing": "learner computes",
    "rollout": "waits for answers",
    "score": "waits for the teacher",
    "queue": "waits, answers queued",
    "sync": "waits for the weight sync",
    "parity": "waits for the parity probe",
    "other": "waits for the loop itself",
}
"""What a step is made of, in the order of the stacks."""

DOING = {"topk": "computing", "accumulate": "computing", "step": "computing"}
"""Stages of the timeline that are the learner's own; the others have their names as classes."""


def parts_of(line: Record) -> dict[str, float]:
    """Seconds of one step by part; they sum to its length. Empty where the line does not say."""
    total, bubble = line.get("time/total_s"), line.get("time/trainer_idle_ratio")
    if not isinstance(total, int | float) or not isinstance(bubble, int | float):
        return {}
    waits = {
        key.removeprefix("time/wait_ratio/"): float(value) * total
        for key, value in line.items()
        if key.startswith("time/wait_ratio/") and isinstance(value, int | float)
    }
    return {"computing": total * (1 - bubble), **waits}


def times_section(run: RunData) -> Html:
    """Stacks of all steps, one step's timeline, the totals."""
    lines = [(line["step"], parts) for line in run.steps if (parts := parts_of(line))]
    seen = [part for part in [*PARTS, *_others(lines)] if any(parts.get(part, 0) > 0 for _, parts in lines)]
    return section(
        "times",
        "Where the time went",
        _stacks(lines, seen) if lines else tag("p", "This run did not write down its steps’ times.", class_="none"),
        _timeline(run),
        _totals(run),
    )


def _others(lines: Sequence[tuple[int, dict[str, float]]]) -> list[str]:
    return sorted({part for _, parts in lines for part in parts} - PARTS.keys())


def _stacks(lines: Sequence[tuple[int, dict[str, float]]], seen: Sequence[str]) -> Html:
    kept = [lines[index] for index in spaced(len(lines), MOST_BARS)]
    bars = [
        Bar(
            f"{step:,}",
            [(stage_class(part), parts.get(part, 0.0)) for part in seen],
            f"step {step}: "
            + ", ".join(
                f"{PARTS.get(part, part)} {duration(parts.get(part, 0.0))}" for part in seen if parts.get(part)
            ),
        )
        for step, parts in kept
    ]
    label = "Seconds of each step by what the learner did or waited for"
    some = "" if len(kept) == len(lines) else f", {len(kept)} of {len(lines)} steps"
    columns = [Column("step", True), *(Column(PARTS.get(part, part), True) for part in seen), Column("total", True)]
    rows: list[list[Child]] = [
        [step, *(fixed(parts.get(part, 0.0), 2) for part in seen), fixed(sum(parts.values()), 2)]
        for step, parts in kept
    ]
    return figure(
        "Seconds of each step",
        scroller(label, stacked_bars(label, bars, y_label="seconds")),
        table(f"{label}, seconds", columns, rows),
        note=f"what the learner did, or waited for{some}",
        keys=legend([(stage_class(part), PARTS.get(part, part)) for part in seen]),
    )


def stage_class(stage: str) -> str:
    """The class that colours a stage."""
    name = DOING.get(stage, stage)
    return f"stage-{name}" if name in PARTS else "stage-other"


# --- one step ---------------------------------------------------------------------------------------------------


def step_lanes(events: Sequence[Record], lengths: Mapping[int, float]) -> tuple[int, float, list[Lane]] | None:
    """(step, seconds, lanes) of the step that is of median length; None without a timeline.

    `lengths` are seconds by step; a step ends with the probe behind its weight sync.
    """
    spans = _spans(events)
    ends: dict[int, float] = {}
    for _, stage, _, end, args in spans:
        if stage in ("step", "sync", "parity") and isinstance(args.get("version"), int):
            ends[args["version"]] = max(end, ends.get(args["version"], end))
    known = sorted((lengths[version], version) for version in ends if lengths.get(version, 0) > 0)
    if not known:
        return None
    seconds, version = known[len(known) // 2]
    start, end = ends[version] - seconds, ends[version]
    inside: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for track, stage, begun, ended, _ in spans:
        if stage != "queue" and ended > start and begun < end:
            inside.setdefault((track, stage), []).append((max(begun, start) - start, min(ended, end) - start))
    order = sorted(inside, key=lambda lane: (min(inside[lane]), lane))
    return version, seconds, [Lane(t, s, stage_class(s), _merged(inside[t, s])) for t, s in order]


def _spans(events: Sequence[Record]) -> list[tuple[str, str, float, float, Record]]:
    """(track, stage, start, end, args), seconds."""
    names: dict[object, str] = {}
    found = []
    for event in events:
        args = event.get("args", {})
        if event.get("ph") == "M" and event.get("name") == "process_name":
            names[event.get("pid")] = str(args.get("name"))
        elif event.get("ph") == "X":
            start = float(event["ts"]) / 1e6
            track = names.get(event.get("pid"), "?")
            found.append((track, str(event["name"]), start, start + float(event["dur"]) / 1e6, args))
    return found


def _merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _timeline(run: RunData) -> Html | None:
    lengths = {line["step"]: sum(parts_of(line).values()) for line in run.steps}
    found = step_lanes(run.events, lengths)
    if found is None:
        return None
    version, seconds, lanes = found
    label = f"Who worked when in step {version}, {duration(seconds)} long"
    rows = [
        [
            f"{lane.track} · {lane.stage}",
            fixed(sum(e - s for s, e in lane.spans), 2),
            fixed(lane.spans[0][0], 2),
            fixed(lane.spans[-1][1], 2),
        ]
        for lane in lanes
    ]
    columns = [Column("who · what"), Column("busy", True), Column("first begins", True), Column("last ends", True)]
    return figure(
        f"One step, number {version}",
        scroller(label, timeline(label, lanes, seconds)),
        table(f"{label}, seconds", columns, rows),
        note="the step of median length; trace.json has all of them, for ui.perfetto.dev",
    )


def _totals(run: RunData) -> Html | None:
    times = run.summary.get("time_s")
    if not isinstance(times, dict):
        return None
    total = times.get("total") or 0.0
    rows = [
        [name, fixed(value, 1), percent(value / total) if total else "–"]
        for name, value in times.items()
        if isinstance(value, int | float)
    ]
    columns = [Column("stage"), Column("seconds", True), Column("of the run", True)]
    return table("Seconds of the whole run by stage; stages overlap", columns, rows)
