"""Measurements of a run for the fit, from ``trace.json``, ``metrics.jsonl`` and ``config.yaml``.

The first step includes start-up (caches, compiled kernels, the context), and so does the first one after a resume. They
are left out if the run has others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.loader import load_config
from common.config.model import Config, ConfigError
from common.telemetry.intervals import Interval
from common.telemetry.trace import Event, read_trace

F64 = NDArray[np.float64]

FAR = 1e6
"""Seconds, longer than any run."""


@dataclass(frozen=True)
class Answer:
    """One answer of a run, times in seconds since the epoch."""

    step: int
    worker: str
    rollout: Interval
    arrived: float
    """Arrival at the teacher: the end of `rollout`, on the teacher's clock."""
    scored: float
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class Measured:
    """Measurements of one run. `micro_batches`: (padded tokens, span). `busy`: spans of work by kind of stage.
    `loop_s`: seconds of each step without any stage at work.
    """

    config: Config
    all_answers: tuple[Answer, ...]
    """All finished answers, for the load that they put on workers and teacher."""
    answers: tuple[Answer, ...]
    """Answers to fit: none of a first step, none in flight with answers that the run ended without."""
    micro_batches: tuple[tuple[int, Interval], ...]
    steps: tuple[Interval, ...]
    busy: dict[str, tuple[Interval, ...]]
    syncs: tuple[Interval, ...]
    """All weight syncs; the engines are paused during them."""
    sync_s: tuple[float, ...]
    parity_s: tuple[float, ...]
    loop_s: tuple[float, ...]


def measured(folder: Path) -> Measured:
    """Read a run's files. Raises ConfigError if one is missing or no step is measured."""
    for name in ("config.yaml", "trace.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: cannot be fitted without {name}; name the folder of a finished run")
    config = load_config(folder / "config.yaml")
    events = read_trace(folder / "trace.json")
    tracks = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    spans = _without_gaps([event for event in events if event["ph"] == "X"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "time/total_s" in line]
    answers = _answers(spans, tracks)
    if not answers or not steps:
        raise ConfigError(
            f"{folder}: cannot be fitted: no finished step has answers with response_tokens in trace.json"
        )
    cold = {min(group) for group in _by_part(steps).values()}
    # Answers of the last steps shared workers with answers that never ended and are not in the timeline.
    known = max(answer.step for answer in answers) - config.rollout.max_staleness
    later = [line for line in steps if line["step"] not in cold] or steps

    def warm(stage: str, key: Callable[[Event], int]) -> list[Event]:
        of_stage = [event for event in spans if event["name"] == stage and "version" in event["args"]]
        return [event for event in of_stage if key(event) not in cold] or of_stage

    accumulated = warm("accumulate", lambda event: event["args"]["version"] + 1)
    batches = [event for event in accumulated if event["args"].get("padded_tokens")]
    closing = {stage: warm(stage, lambda event: event["args"]["version"]) for stage in ("step", "sync", "parity")}
    return Measured(
        config=config,
        answers=tuple(one for one in answers if one.step + 1 not in cold and one.step <= known) or tuple(answers),
        all_answers=tuple(answers),
        micro_batches=tuple((event["args"]["padded_tokens"], _span(event)) for event in batches),
        steps=tuple(_span(event) for event in closing["step"]),
        busy={
            kind: tuple(_span(event) for event in spans if event["name"] in names)
            for kind, names in (("rollout", ("rollout",)), ("teacher", ("score",)), ("learner", ("accumulate", "step")))
        },
        syncs=tuple(_span(event) for event in spans if event["name"] == "sync"),
        sync_s=tuple(event["dur"] / 1e6 for event in closing["sync"]),
        parity_s=tuple(event["dur"] / 1e6 for event in closing["parity"]),
        loop_s=tuple(line["time/total_s"] * line.get("time/wait_ratio/other", 0.0) for line in later),
    )


def _without_gaps(spans: list[Event]) -> list[Event]:
    """The spans up to the first step that a long run left out (`common.telemetry.kept_steps`)."""
    closing = [event for event in spans if event["name"] in ("step", "sync", "parity") and "version" in event["args"]]
    known = sorted({event["args"]["version"] for event in closing})
    last = next((version for version, following in pairwise(known) if following > version + 1), None)
    if last is None:
        return spans
    end = max(_span(event)[1] for event in closing if event["args"]["version"] == last)
    return [event for event in spans if _span(event)[1] <= end]


def _by_part(lines: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """Steps by the process of the run that made them; a resumed run has several."""
    parts: dict[int, list[int]] = {}
    for line in lines:
        parts.setdefault(line.get("run/part", 1), []).append(line["step"])
    return parts


def _answers(spans: Sequence[Event], tracks: dict[int, str]) -> list[Answer]:
    scores = [event for event in spans if event["name"] == "score" and "sample" in event.get("args", {})]
    scored = {event["args"]["sample"]: _span(event)[1] for event in scores}
    return [
        Answer(
            step=int(event["args"]["sample"].split("/")[0]),
            worker=tracks[event["pid"]],
            rollout=_span(event),
            arrived=_span(event)[1],
            scored=scored[event["args"]["sample"]],
            prompt_tokens=event["args"]["prompt_tokens"],
            response_tokens=event["args"]["response_tokens"],
        )
        for event in spans
        if event["name"] == "rollout" and "response_tokens" in event["args"] and event["args"]["sample"] in scored
    ]


def _span(event: Event) -> Interval:
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


# --- interference ---------------------------------------------------------------------------------------------------


def without_interference(run: Measured, interference: float) -> Measured:
    """The run with each kind of stage on a clock that removes the slowdown by the other kinds, `interference` each."""
    if interference == 0:
        return run
    clocks = _clocks(run.busy, interference)
    rollout, teacher, learner = (_convert_by(clocks[kind]) for kind in ("rollout", "teacher", "learner"))

    def converted(answers: Sequence[Answer]) -> tuple[Answer, ...]:
        at_teacher = teacher([(answer.arrived, answer.scored) for answer in answers])
        spans = rollout([answer.rollout for answer in answers])
        return tuple(
            replace(answer, rollout=span, arrived=arrived, scored=scored)
            for answer, span, (arrived, scored) in zip(answers, spans, at_teacher, strict=True)
        )

    sizes, batches = zip(*run.micro_batches, strict=True)
    return replace(
        run,
        all_answers=converted(run.all_answers),
        answers=converted(run.answers),
        micro_batches=tuple(zip(sizes, learner(batches), strict=True)),
        steps=learner(run.steps),
        syncs=rollout(run.syncs),
    )


def _clocks(busy: dict[str, tuple[Interval, ...]], interference: float) -> dict[str, Callable[[F64], F64]]:
    """Functions, by kind of stage, from moments to the seconds of undisturbed work until then."""
    times = np.unique(np.concatenate([np.ravel(spans) for spans in busy.values() if spans]))
    middle = (times[1:] + times[:-1]) / 2
    at_work = {}
    for kind, spans in busy.items():
        starts, ends = np.array(spans, np.float64).reshape(-1, 2).T
        at_work[kind] = np.searchsorted(np.sort(starts), middle) > np.searchsorted(np.sort(ends), middle)
    active = np.sum(list(at_work.values()), axis=0)

    def clock(kind: str) -> Callable[[F64], F64]:
        slowness = 1 + interference * (active - at_work[kind])
        worked = times[0] + np.concatenate([[0.0], np.cumsum(np.diff(times) / slowness)])
        # No interference before the first span and after the last.
        known = np.concatenate([[times[0] - FAR], times, [times[-1] + FAR]])
        undisturbed = np.concatenate([[worked[0] - FAR], worked, [worked[-1] + FAR]])
        return lambda moments: np.asarray(np.interp(moments, known, undisturbed))

    return {kind: clock(kind) for kind in busy}


def _convert_by(clock: Callable[[F64], F64]) -> Callable[[Sequence[Interval]], tuple[Interval, ...]]:
    def convert(spans: Sequence[Interval]) -> tuple[Interval, ...]:
        return tuple((float(start), float(end)) for start, end in clock(np.array(spans, np.float64).reshape(-1, 2)))

    return convert
