"""Files of a run of 10,000 steps, and its report: sizes, seconds to write it and to open it in a browser."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.telemetry.kept_steps import TOKEN_STEPS, keeps_details, keeps_trace
from common.telemetry.trace import TraceFile, TraceSpan
from deploy.report.writing import write_report
from tests.benchmarks.figures import Figure, Figures
from tests.support.browser import browser_tab, find_browser
from tests.support.memory import peak_bytes, reset_peak
from tests.support.report_run import write_run

STEPS, ANSWERS, TOKENS, TOKEN_SAMPLES = 10_000, 1024, 512, 2
MORE_METRICS = 40
"""Numbers a step in addition to those of `write_run`: a run has about 60."""
OPENINGS = 3


def run() -> Figures:
    """All figures; without a browser the one of opening is left out."""
    with tempfile.TemporaryDirectory(prefix="bench-report-") as made:
        folder = write_run(Path(made) / "run", steps=STEPS)
        lengthen(folder)
        sizes = {name: (folder / name).stat().st_size for name in ("metrics.jsonl", "tokens.jsonl", "trace.json")}
        before, began = reset_peak(), time.perf_counter()
        page = write_report(folder)
        took, peak = time.perf_counter() - began, peak_bytes() - before
        how = f"a run of {STEPS:,} steps of {ANSWERS:,} answers of {TOKENS} tokens"
        figures = {
            "report.files_mb": Figure(
                sum(sizes.values()) / 1e6,
                "MB",
                f"{how}: {', '.join(f'{name} {size / 1e6:.0f}' for name, size in sizes.items())}",
                at_most=500,
            ),
            "report.write_s": Figure(took, "s", f"write_report of {how}; {peak / 1e6:.0f} MB of memory"),
        }
        if (program := find_browser()) is not None:
            figures["report.open_s"] = Figure(
                opening_s(program, page, Path(made) / "profile"),
                "s",
                f"report.html of {how}, {page.stat().st_size / 1e6:.1f} MB, from navigation to a drawn page, the "
                f"slowest of {OPENINGS}",
                at_most=3,
            )
        return figures


def opening_s(program: str, page: Path, profile: Path) -> float:
    """Seconds until the page is loaded and drawn, the most of `OPENINGS`."""
    seconds = []
    with browser_tab(program, profile) as tab:
        for _ in range(OPENINGS):
            began = time.perf_counter()
            tab.open(page, width=1280)
            tab.screenshot(profile / "page.png")
            seconds.append(time.perf_counter() - began)
            assert tab.errors == []
    return max(seconds)


def lengthen(folder: Path) -> None:
    """Give the run the metrics, answers token by token and timeline that a run of these sizes writes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    more = {f"more/metric_{number}": 0.123456789012345 for number in range(MORE_METRICS)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, **more}) + "\n" for line in lines))
    record = json.loads((folder / "tokens.jsonl").read_text().splitlines()[0])
    columns = {name: (value * TOKENS)[:TOKENS] for name, value in record.items() if isinstance(value, list)}
    with (folder / "tokens.jsonl").open("w") as tokens:
        for step in range(1, STEPS + 1):
            if keeps_details(step, TOKEN_STEPS):
                for number in range(TOKEN_SAMPLES):
                    line = {**record, **columns, "step": step, "sample": f"{step}/{number}/row/0"}
                    tokens.write(json.dumps({**line, "response_tokens": TOKENS}) + "\n")
    with TraceFile(folder / "trace.json") as trace:
        for step in range(STEPS):
            if keeps_trace(step + 1, ANSWERS):
                trace.write(spans(step))


def spans(step: int) -> Iterator[TraceSpan]:
    """The spans of one step of six seconds."""
    at = 1000.0 + 6 * step
    samples = [f"{step}/{number}/row-{number}/0" for number in range(ANSWERS)]
    for number, sample in enumerate(samples):
        args: dict[str, Any] = {"sample": sample}
        end = at + 0.5 + 3 * number / ANSWERS
        yield TraceSpan("queue", "controller", at, at + 0.1, args)
        yield TraceSpan("rollout", f"worker {number % 8}", at + 0.1, end, {**args, "response_tokens": TOKENS})
        yield TraceSpan("score", "teacher", end, end + 0.3, args)
    for first in range(0, ANSWERS, 16):
        start = at + 1 + 3 * first / ANSWERS
        args = {"version": step, "samples": tuple(samples[first : first + 16])}
        yield TraceSpan("accumulate", "rank 0", start, start + 0.04, args)
    yield TraceSpan("step", "rank 0", at + 4.2, at + 4.6, {"version": step + 1})
    yield TraceSpan("sync", "controller", at + 4.6, at + 5.6, {"version": step + 1})
    yield TraceSpan("parity", "controller", at + 5.6, at + 6.0, {"version": step + 1})
