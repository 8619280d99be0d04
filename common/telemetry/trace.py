"""Spans of a run as a timeline that https://ui.perfetto.dev and ``chrome://tracing`` open.

The file is the JSON array form of the Trace Event Format, one event a line. A reader of that format does without the
closing bracket, so what a crash leaves behind opens too.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common.telemetry.run_files import Span

Event = dict[str, Any]
"""One event of the Trace Event Format."""

STAGES = ("rollout", "queue", "score", "accumulate", "step", "sync", "parity", "checkpoint", "evaluate")
"""Rows of one track in this order, other stages below them."""


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """One piece of work: what (`stage`), where (`track`: ``worker 3``, ``rank 0``, ``teacher``, ``controller``), when
    (seconds since the epoch, both from the clock of the process that did it), and for which sample, step or version.
    """

    stage: str
    track: str
    start: float
    end: float
    args: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def interval(self) -> Span:
        """(start, end)."""
        return self.start, self.end


@dataclass
class TraceLayout:
    """Where spans are drawn: a process of the format for each track, a thread for each lane of a stage.

    Events of one thread must not overlap, and a worker has many answers in flight: a span goes to the lane of its
    stage that has been free for longest, or opens one.
    """

    tracks: dict[str, int] = field(default_factory=dict)
    """Track -> its process id in the file."""
    _lanes: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    """(track, stage) -> heap of its lanes: end of the last event in microseconds, thread id."""
    _threads: dict[str, int] = field(default_factory=dict)
    """Track -> how many threads it has."""

    def events(self, spans: Iterable[TraceSpan]) -> list[Event]:
        """Complete events (``ph: X``) of `spans`, each behind the names of the track and lane that it is first on."""
        found: list[Event] = []
        for span in sorted(spans, key=lambda span: span.start):
            found += self._place(span)
        return found

    def _place(self, span: TraceSpan) -> list[Event]:
        named: list[Event] = []
        if span.track not in self.tracks:
            self.tracks[span.track] = len(self.tracks) + 1
            named.append(_name("process_name", self.tracks[span.track], 0, span.track))
        process = self.tracks[span.track]
        # Both ends are rounded alike, so spans that touch still touch and never overlap.
        start = round(span.start * 1e6)
        end = max(start, round(span.end * 1e6))  # a clock may be set back while something runs
        lanes = self._lanes.setdefault((span.track, span.stage), [])
        if lanes and lanes[0][0] <= start:
            thread = lanes[0][1]
            heapq.heapreplace(lanes, (end, thread))
        else:
            thread = self._threads[span.track] = self._threads.get(span.track, 0) + 1
            named.append(_name("thread_name", process, thread, f"{span.stage} {len(lanes)}"))
            order = STAGES.index(span.stage) if span.stage in STAGES else len(STAGES)
            named.append(_meta("thread_sort_index", process, thread, {"sort_index": order * 10_000 + len(lanes)}))
            heapq.heappush(lanes, (end, thread))
        event: Event = {
            "name": span.stage,
            "cat": span.stage,
            "ph": "X",
            "ts": start,
            "dur": end - start,
            "pid": process,
            "tid": thread,
        }
        return [*named, {**event, "args": dict(span.args)} if span.args else event]

    def recall(self, events: Iterable[Event]) -> None:
        """Take over tracks and lanes from the events of a file that is written on."""
        names = {number: track for track, number in self.tracks.items()}
        stages: dict[tuple[int, int], str] = {}
        ends: dict[tuple[int, int], int] = {}
        for event in events:
            process, thread = place = int(event["pid"]), int(event["tid"])
            if event["name"] == "process_name":
                names[process] = event["args"]["name"]
                self.tracks[names[process]] = process
            elif event["name"] == "thread_name":
                stages[place] = event["args"]["name"].rpartition(" ")[0]
                self._threads[names[process]] = max(thread, self._threads.get(names[process], 0))
            elif event["ph"] == "X":
                ends[place] = int(event["ts"]) + int(event["dur"])
        for (process, thread), stage in stages.items():
            lanes = self._lanes.setdefault((names[process], stage), [])
            heapq.heappush(lanes, (ends.get((process, thread), 0), thread))


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return _meta(kind, process, thread, {"name": name})


def _meta(kind: str, process: int, thread: int, args: Mapping[str, str | int]) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": dict(args)}


def trace_events(spans: Iterable[TraceSpan]) -> list[Event]:
    """All events of a finished set of spans, times in microseconds since the epoch."""
    return TraceLayout().events(spans)


def read_trace(path: Path) -> list[Event]:
    """The events of a trace file, closed or cut anywhere: what is behind the last whole event is left out."""
    return _whole_events(path.read_bytes())[0]


def _whole_events(data: bytes) -> tuple[list[Event], int]:
    """(events, bytes up to the end of the last whole one)."""
    events: list[Event] = []
    kept = position = 0
    for line in data.splitlines(keepends=True):
        position += len(line)
        text = line.strip().rstrip(b",")
        if text in (b"[", b""):
            continue
        try:
            event = json.loads(text)
        except ValueError:  # the closing bracket, or the half line of a crash
            break
        events.append(event)
        kept = position - len(line) + line.rindex(b"}") + 1
    return events, kept


class TraceFile:
    """``trace.json`` of a run, written while it goes; `close` (or leaving the block) makes it strict JSON.

    With `resume`, a file that is there is written on, with its tracks; otherwise it is begun anew.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self._layout = TraceLayout()
        path.parent.mkdir(parents=True, exist_ok=True)
        events: list[Event] = []
        if resume and path.exists():
            events, kept = _whole_events(path.read_bytes())
            os.truncate(path, kept)
            self._layout.recall(events)
        self._empty = not events
        self._stream = path.open("a" if events else "w", encoding="utf-8")
        if self._empty:
            self._stream.write("[\n")
            self._stream.flush()

    def write(self, spans: Iterable[TraceSpan]) -> None:
        """Add spans: on disk when this returns."""
        lines = [json.dumps(event, ensure_ascii=False) for event in self._layout.events(spans)]
        if lines:
            # The comma stands ahead of an event: a file without its end is one bracket short of strict JSON.
            self._stream.write(("" if self._empty else ",\n") + ",\n".join(lines))
            self._stream.flush()
            self._empty = False

    def close(self) -> None:
        """Write the closing bracket, once."""
        if not self._stream.closed:
            self._stream.write("\n]\n")
            self._stream.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
