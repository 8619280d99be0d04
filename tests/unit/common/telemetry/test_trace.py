"""Timeline file: layout of spans, flow arrows of samples, recovery after a crash."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.telemetry.trace import Event, TraceFile, TraceLayout, TraceSpan, read_trace

EPOCH = 1_790_000_000.0


def span(stage: str, track: str, start: float, end: float, **args: str | int) -> TraceSpan:
    return TraceSpan(stage, track, EPOCH + start, EPOCH + end, args)


def complete(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def names(events: list[Event], kind: str) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == kind}


def test_a_span_becomes_a_complete_event_in_microseconds() -> None:
    [event] = complete(TraceLayout().events([span("score", "teacher", 1.0, 1.25, sample_id="0/1/row/0", step=3)]))
    assert event["name"] == "score"
    assert event["ts"] == (EPOCH + 1) * 1e6
    assert event["dur"] == 250_000
    assert event["args"] == {"sample_id": "0/1/row/0", "step": 3}


def test_each_track_is_a_process_and_overlapping_spans_get_lanes() -> None:
    events = TraceLayout().events(
        [
            span("rollout", "worker 0", 0, 3),
            span("rollout", "worker 0", 1, 2),
            span("rollout", "worker 0", 3, 4),  # both lanes are free again, the second for longer
            span("rollout", "worker 1", 0, 1),
            span("score", "worker 0", 2, 3),
        ]
    )
    processes = {name: pid for (pid, _), name in names(events, "process_name").items()}
    assert set(processes) == {"worker 0", "worker 1"}
    threads = names(events, "thread_name")
    placed = sorted((threads[e["pid"], e["tid"]], e["pid"], e["ts"] - EPOCH * 1e6) for e in complete(events))
    assert placed == [
        ("rollout 0", processes["worker 0"], 0),
        ("rollout 0", processes["worker 1"], 0),
        ("rollout 1", processes["worker 0"], 1e6),
        ("rollout 1", processes["worker 0"], 3e6),
        ("score 0", processes["worker 0"], 2e6),
    ]


def test_a_samples_arrows_lead_from_its_rollout_over_its_score_to_its_micro_batch() -> None:
    events = TraceLayout().events(
        [
            span("queue", "controller", 0, 1, sample="a"),
            span("rollout", "worker 0", 1, 2, sample="a"),
            span("rollout", "worker 0", 1, 3, sample="b"),
            span("score", "teacher", 2, 4, sample="a"),
            span("score", "teacher", 3, 4, sample="b"),
            TraceSpan("accumulate", "rank 0", EPOCH + 4, EPOCH + 5, {"version": 3, "samples": ("a", "b")}),
        ]
    )
    slices = {(e["pid"], e["tid"], e["ts"]): e["name"] for e in complete(events)}
    flows = [event for event in events if event["ph"] in "stf"]
    for sample in ("a", "b"):
        ends = [(e["ph"], slices[e["pid"], e["tid"], e["ts"]]) for e in flows if e["id"] == sample]
        assert ends == [("s", "rollout"), ("t", "score"), ("f", "accumulate")]
    assert {(e["name"], e["cat"], e["bp"]) for e in flows} == {("sample", "sample", "e")}


def test_rows_of_a_track_follow_the_pipeline() -> None:
    events = TraceLayout().events([span(stage, "w", 0, 1) for stage in ("mystery", "step", "rollout")])
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    ranked = sorted(names(events, "thread_name").items(), key=lambda item: order[item[0]])
    assert [name for _, name in ranked] == ["rollout 0", "step 0", "mystery 0"]


def test_a_clock_that_was_set_back_leaves_an_empty_event() -> None:
    [event] = complete(TraceLayout().events([span("step", "rank 0", 5, 4)]))
    assert (event["ts"], event["dur"]) == ((EPOCH + 5) * 1e6, 0)


@given(
    st.lists(
        st.lists(
            st.tuples(st.floats(0, 10), st.floats(0, 3), st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"])),
            max_size=12,
        ),
        max_size=4,
    )
)
def test_events_of_one_lane_never_overlap(batches: list[list[tuple[float, float, str, str]]]) -> None:
    layout = TraceLayout()
    events = [
        event
        for batch in batches
        for event in layout.events([span(stage, track, start, start + length) for start, length, stage, track in batch])
    ]
    assert len(complete(events)) == sum(map(len, batches))
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in complete(events):
        lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(lanes) <= set(names(events, "thread_name"))
    for intervals in lanes.values():
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(intervals)))


def test_a_closed_file_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "trace.json"
    with TraceFile(path) as trace:
        trace.write([span("rollout", "worker 0", 0, 1)])
        trace.write([])
        trace.write([span("score", "teacher", 1, 2)])
    assert json.loads(path.read_text()) == read_trace(path)
    assert [e["name"] for e in complete(read_trace(path))] == ["rollout", "score"]
    with TraceFile(path):
        pass
    assert json.loads(path.read_text()) == []


def test_what_was_written_is_on_disk_and_one_bracket_short_of_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    trace.write([span("rollout", "worker 0", 0, 1)])
    assert len(json.loads(path.read_text() + "]")) == 4
    trace.close()


@pytest.mark.parametrize("lost", [0, 1, 3, 40, 10**6])
def test_a_resumed_file_keeps_whole_events_and_their_tracks(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace:
        trace.write(
            [span("rollout", "worker 0", 0, 3), span("rollout", "worker 0", 1, 5), span("step", "rank 0", 3, 4)]
        )
    data = path.read_bytes()
    path.write_bytes(data[: max(0, len(data) - lost)])
    before = read_trace(path)
    with TraceFile(path, resume_at=len(data)) as trace:
        trace.write([span("rollout", "worker 0", 2, 6), span("rollout", "worker 0", 4, 6), span("parity", "new", 6, 7)])
    events = json.loads(path.read_text())
    assert events[: len(before)] == before
    if lost < 40:
        threads = names(events, "thread_name")
        assert len(threads) == 5
        late = {e["ts"] - EPOCH * 1e6: threads[e["pid"], e["tid"]] for e in complete(events)[3:]}
        assert late == {2e6: "rollout 2", 4e6: "rollout 0", 6e6: "parity 0"}  # lane 0 is busy until 3, lane 1 until 5
    processes = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert len(processes) == len(set(processes))


def test_steps_that_a_resumed_run_repeats_are_in_its_file_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with TraceFile(path) as trace:
        trace.write([span("rollout", "worker 0", 0, 3), span("step", "rank 0", 3, 4)])
        checkpoint = trace.size()
        trace.write([span("rollout", "worker 0", 4, 7), span("step", "rank 0", 7, 8)])
    with TraceFile(path, resume_at=checkpoint) as trace:
        trace.write([span("rollout", "worker 0", 20, 23), span("step", "rank 0", 23, 24)])
    events = json.loads(path.read_text())
    assert [event["ts"] - EPOCH * 1e6 for event in complete(events)] == [0, 3e6, 20e6, 23e6]


def test_without_resume_a_file_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for start in (0, 1):
        with TraceFile(path) as trace:
            trace.write([span("rollout", "worker 0", start, 2)])
    assert [e["ts"] for e in complete(read_trace(path))] == [(EPOCH + 1) * 1e6]
