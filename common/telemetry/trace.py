"""Spans of a run as a timeline that https://ui.perfetto.dev and ``chrome://tracing`` open.

The file is the JSON array form of the Trace Event Format, one event a line. Readers of that format do not need the
closing bracket, so a file cut by a crash opens too.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common.telemetry.intervals import Interval

Event = dict[str, Any]
"""One event of the Trace Event Format."""

STAGES = ("rollout", "queue", "score", "accumulate", "step", "sync", "parity", "checkpoint", "evaluate")
"""Order of a track's rows; other stages come below."""

FLOW_PHASES = {"rollout": "s", "score": "t", "accumulate": "f"}
"""Flow arrows of a sample start at its rollout, pass through its score and end at its micro-batch."""


@dataclass(frozen=True, slots=True)
class TraceSpan:
    """One piece of work on a `track` (``worker 3``, ``rank 0``, ``teacher``, ``controller``).

    `start` and `end` are seconds since the epoch, by the clock of the process that did the work. `args` name the
    sample, step or version; ``sample`` or ``samples`` bind the span to the flow arrows of those samples.
    """

    stage: str
    track: str
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def interval(self) -> Interval:
        """(start, end)."""
        return self.start, self.end


@dataclass
class TraceLayout:
    """Layout of spans: one process of the format per track, one thread per lane of a stage.

    Events of one thread must not overlap, and a worker has many answers in flight: a span goes to the lane of its
    stage that has been free longest, or opens a new one.
    """

    tracks: dict[str, int] = field(default_factory=dict)
    """Track -> process id in the file."""
    _lanes: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    """(track, stage) -> heap of lanes: end of the last event in microseconds, thread id."""
    _threads: dict[str, int] = field(default_factory=dict)
    """Track -> number of threads."""

    def events(self, spans: Iterable[TraceSpan]) -> list[Event]:
        """Convert `spans` to complete events (``ph: X``) and flow events, after the names of any new track and lane."""
        found: list[Event] = []
        for span in sorted(spans, key=lambda span: span.start):
            found += self._span_events(span)
        return found

    def _span_events(self, span: TraceSpan) -> list[Event]:
        names: list[Event] = []
        if span.track not in self.tracks:
            self.tracks[span.track] = len(self.tracks) + 1
            names.append(_name("process_name", self.tracks[span.track], 0, span.track))
        process = self.tracks[span.track]
        # Both ends are rounded alike, so adjacent spans stay adjacent and never overlap.
        start = round(span.start * 1e6)
        end = max(start, round(span.end * 1e6))  # the clock may be set back during a span
        lanes = self._lanes.setdefault((span.track, span.stage), [])
        if lanes and lanes[0][0] <= start:
            thread = lanes[0][1]
            heapq.heapreplace(lanes, (end, thread))
        else:
            thread = self._threads[span.track] = self._threads.get(span.track, 0) + 1
            names.append(_name("thread_name", process, thread, f"{span.stage} {len(lanes)}"))
            order = STAGES.index(span.stage) if span.stage in STAGES else len(STAGES)
            names.append(_metadata("thread_sort_index", process, thread, {"sort_index": order * 10_000 + len(lanes)}))
            heapq.heappush(lanes, (end, thread))
        common = {"ts": start, "pid": process, "tid": thread}
        event: Event = {"name": span.stage, "cat": span.stage, "ph": "X", "dur": end - start, **common}
        if span.args:
            event["args"] = dict(span.args)
        return [*names, event, *_flow_events(span, common)]

    def restore(self, events: Iterable[Event]) -> None:
        """Take over tracks and lanes from the events of a file that is continued."""
        names = {number: track for track, number in self.tracks.items()}
        stages: dict[tuple[int, int], str] = {}
        ends: dict[tuple[int, int], int] = {}
        for event in events:
            process, thread = lane = int(event["pid"]), int(event["tid"])
            if event["name"] == "process_name":
                names[process] = event["args"]["name"]
                self.tracks[names[process]] = process
            elif event["name"] == "thread_name":
                stages[lane] = event["args"]["name"].rpartition(" ")[0]
                self._threads[names[process]] = max(thread, self._threads.get(names[process], 0))
            elif event["ph"] == "X":
                ends[lane] = int(event["ts"]) + int(event["dur"])
        for (process, thread), stage in stages.items():
            lanes = self._lanes.setdefault((names[process], stage), [])
            heapq.heappush(lanes, (ends.get((process, thread), 0), thread))


def _flow_events(span: TraceSpan, common: Event) -> Iterator[Event]:
    """Flow events of a span's samples, bound to the span itself (``bp: e``)."""
    if span.stage in FLOW_PHASES:
        one = span.args.get("sample")
        for sample in span.args.get("samples", ()) if one is None else (one,):
            yield {"name": "sample", "cat": "sample", "ph": FLOW_PHASES[span.stage], "id": sample, "bp": "e", **common}


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return _metadata(kind, process, thread, {"name": name})


def _metadata(kind: str, process: int, thread: int, args: Mapping[str, str | int]) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": dict(args)}


def read_trace(path: Path) -> list[Event]:
    """Events of a trace file, closed or cut anywhere; a partial last event is dropped."""
    return list(TraceEvents(path))


@dataclass(frozen=True, slots=True)
class TraceEvents:
    """The events of `read_trace`, read from the file each time they are iterated: a long run's do not fit in memory."""

    path: Path

    def __iter__(self) -> Iterator[Event]:
        with self.path.open("rb") as stream:
            yield from (event for event, _ in _whole_events(stream))


def _whole_events(lines: Iterable[bytes]) -> Iterator[tuple[Event, int]]:
    """Yield each event of a file's lines, with the bytes up to its end."""
    position = 0
    for line in lines:
        position += len(line)
        text = line.strip().rstrip(b",")
        if text in (b"[", b""):
            continue
        try:
            event = json.loads(text)
        except ValueError:  # the closing bracket, or a line cut by a crash
            return
        yield event, position - len(line) + line.rindex(b"}") + 1


class TraceFile:
    """``trace.json`` of a run, written during the run; `close` (or leaving the block) makes it strict JSON.

    With `resume_at`, a `size` that the file had, it is continued with its tracks: what was written after that, by steps
    that are repeated now, is dropped. Otherwise the file is overwritten.
    """

    def __init__(self, path: Path, *, resume_at: int | None = None) -> None:
        self._layout = TraceLayout()
        path.parent.mkdir(parents=True, exist_ok=True)
        events: list[Event] = []
        if resume_at is not None and path.exists():
            whole = list(_whole_events(path.read_bytes()[:resume_at].splitlines(keepends=True)))
            events = [event for event, _ in whole]
            os.truncate(path, whole[-1][1] if whole else 0)
            self._layout.restore(events)
        self._empty = not events
        self._stream = path.open("a" if events else "w", encoding="utf-8")
        if self._empty:
            self._stream.write("[\n")
            self._stream.flush()

    def write(self, spans: Iterable[TraceSpan]) -> None:
        """Append spans and flush the file."""
        lines = [json.dumps(event, ensure_ascii=False) for event in self._layout.events(spans)]
        if lines:
            # Commas precede events, so an unclosed file lacks only the bracket of strict JSON.
            self._stream.write(("" if self._empty else ",\n") + ",\n".join(lines))
            self._stream.flush()
            self._empty = False

    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._stream.fileno()).st_size

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
