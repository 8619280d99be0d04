"""A whole run on real parts that does not end by itself: watched, interrupted, resumed, ended by a lost teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import prometheus_server
from tests.support.dashboard import queries
from tests.support.processes import assert_nothing_left, descendants, free_port
from tests.support.runs import finish, metric_lines, started_run, wait_for_step, write_run

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class LongRun:
    """A run that does not end by itself, with a teacher server and, for half of its rows, a teacher that it starts.

    Its adapters are trained and published as files.
    """

    process: subprocess.Popen[str]
    config: Path
    run: Path
    """Its folder."""
    metrics_port: int
    teacher_url: str
    teacher_pid: int

    @property
    def remote(self) -> tuple[str, str]:
        return f"teacher.url={self.teacher_url}", "teacher.request_timeout_s=5"


@pytest.fixture(scope="module")
def long_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    teacher_process: Callable[[Path], tuple[str, int]],
) -> Iterator[LongRun]:
    folder, port = tmp_path_factory.mktemp("long"), free_port()
    config = write_run(
        folder,
        tiny_model,
        learner={"steps": 10_000, "lora": {"rank": 8, "publish": "adapter"}},
        sync={"backend": "file"},
        checkpoint={"every": 2},
        eval={"every": 0},
        teachers={"started": {"model": str(tiny_model), "threads": 1}},
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    names = ["started", None] * 4
    changed = [json.dumps({**row, "teacher": name}) for row, name in zip(rows, names, strict=True)]
    (folder / "train.jsonl").write_text("\n".join(changed))
    url, pid = teacher_process(config)
    remote = (f"teacher.url={url}", "teacher.request_timeout_s=5")
    with started_run(config, f"run.metrics_port={port}", *remote) as process:
        yield LongRun(process, config, folder / "runs/tiny", port, url, pid)


NEEDS_MORE = ("rejected", "accuracy")
"""Series of events that the run below does not have: refused requests, and evaluations."""


@pytest.mark.skipif(prometheus_server.PROGRAM is None, reason="no prometheus on PATH")
def test_the_dashboards_queries_find_a_run_in_a_real_prometheus(long_run: LongRun, tmp_path: Path) -> None:
    with prometheus_server.scraping(f"127.0.0.1:{long_run.metrics_port}", tmp_path, free_port()) as url:
        wait_for_step(long_run.run, long_run.process, 2)
        prometheus_server.wait_until_found(url, "rate(opcd_teacher_tokens_scored_total[20s]) > 0", 60)
        found = {}
        for query in queries():
            asked = query.replace("$__rate_interval", "20s").replace("$run", ".*")
            found[query] = prometheus_server.answers(url, asked)  # every query is one that Prometheus takes
    ours = {query: series for query, series in found.items() if "opcd_" in query}
    assert [query for query, series in ours.items() if not series and not any(n in query for n in NEEDS_MORE)] == []
    assert {series["metric"]["run"] for series in ours['opcd_run_step{run=~"$run"}']} == {"tiny"}


@dataclass(frozen=True)
class InterruptedRun:
    """A `LongRun` after Ctrl-C."""

    printed: str
    children: set[int]
    """Processes of the run, before Ctrl-C."""


@pytest.fixture(scope="module")
def interrupted_run(long_run: LongRun) -> InterruptedRun:
    wait_for_step(long_run.run, long_run.process, 3)
    children = descendants(long_run.process.pid)
    long_run.process.send_signal(signal.SIGINT)
    return InterruptedRun(finish(long_run.process, status=130), children)


def test_ctrl_c_keeps_the_weights_and_leaves_no_process(long_run: LongRun, interrupted_run: InterruptedRun) -> None:
    assert "interrupted after" in interrupted_run.printed
    assert "Traceback" not in interrupted_run.printed
    summary = json.loads((long_run.run / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"
    assert summary["steps"] >= 2
    assert (long_run.run / "checkpoint/adapter_model.safetensors").exists()
    assert_nothing_left(interrupted_run.children)


def test_an_interrupted_run_resumes_and_a_lost_teacher_ends_it_in_one_clear_line(
    long_run: LongRun, interrupted_run: InterruptedRun
) -> None:
    run = long_run.run
    newest = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    with started_run(long_run.config, *long_run.remote, "--resume") as process:
        wait_for_step(run, process, newest + 2)
        children = descendants(process.pid)
        os.kill(long_run.teacher_pid, signal.SIGKILL)
        printed, errors = process.communicate(timeout=90)
    assert process.returncode == 2
    assert "resumed from" in printed
    messages = [line for line in errors.splitlines() if line.startswith("opcd: ")]
    assert len(messages) == 1
    assert long_run.teacher_url in messages[0]
    assert "Traceback" not in errors
    assert json.loads((run / "summary.json").read_text())["outcome"].startswith("failed: TeacherError")
    assert_nothing_left(children)
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= newest + 2
    assert lines[-1]["kl/lower_bound"] < lines[0]["kl/lower_bound"]
    assert max(line["parity/max_nats"] for line in lines) <= 2e-4
