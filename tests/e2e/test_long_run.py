"""A whole run on real parts that does not end by itself: interrupted, resumed, watched, ended by a lost teacher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.telemetry.trace import read_trace
from deploy.cli.main import app
from tests.support import prometheus_server
from tests.support.dashboard import queries
from tests.support.processes import assert_nothing_left, descendants, free_port
from tests.support.runs import finish, metric_lines, started_run, wait_for_step, write_run


@dataclass(frozen=True)
class InterruptedRun:
    """A run after Ctrl-C."""

    folder: Path
    """Of its data and configuration."""
    printed: str
    children: set[int]
    """Its processes before Ctrl-C."""
    seconds: float
    """From the start of its process to its end."""

    @property
    def run(self) -> Path:
        """Its own folder."""
        return self.folder / "runs/tiny"


ADAPTERS: dict[str, dict[str, Any]] = {
    "learner": {"steps": 10_000, "lora": {"rank": 8, "publish": "adapter"}},
    "sync": {"backend": "file"},
    "eval": {"every": 0},
}


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> InterruptedRun:
    """Adapters learn from the base model inside the learner: no teacher server, weights as files, and the learner's
    top-k, which is the whole vocabulary.
    """
    folder = tmp_path_factory.mktemp("long")
    config = write_run(
        folder,
        tiny_model,
        **ADAPTERS,
        teacher={"kind": "base"},
        rollout={"topk_from": "learner"},
        loss={"form": "exact", "top_k": 512},
    )
    began = time.monotonic()
    with started_run(config) as process:
        wait_for_step(folder / "runs/tiny", process, 4)
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        return InterruptedRun(folder, finish(process, status=130), children, time.monotonic() - began)


def test_ctrl_c_keeps_the_weights_and_leaves_no_process(interrupted_run: InterruptedRun) -> None:
    run = interrupted_run.run
    assert "interrupted after" in interrupted_run.printed
    assert "Traceback" not in interrupted_run.printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"
    assert summary["steps"] >= 3
    assert (run / "checkpoint/adapter_model.safetensors").exists()
    # A checkpoint of the last whole step, long before the first one by time.
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{summary['steps']:06d}"]
    command = f"opcd train {run}/config.yaml --resume"
    assert f"to go on from step {summary['steps']}: {command}" in interrupted_run.printed
    assert_nothing_left(interrupted_run.children)
    lines = metric_lines(run)
    assert lines[-1]["kl/lower_bound"] < lines[0]["kl/lower_bound"]
    for line in lines:
        assert line["mass/student_topk"] == pytest.approx(1, abs=1e-5)
        assert line["kl/tail"] == pytest.approx(0, abs=1e-9)
        assert line["loss"] == pytest.approx(line["kl/support"], rel=1e-5)
    assert "time/score_s" in {key for line in lines for key in line}


@dataclass(frozen=True)
class ResumedRun:
    """The interrupted run again, from its newest checkpoint, with other teachers: a server that the test has started
    and, for half of the rows, one that the run starts.
    """

    process: subprocess.Popen[str]
    run: Path
    first_step: int
    metrics_port: int
    teacher_url: str
    teacher_pid: int
    began: float
    """``time.monotonic()`` at the start of its process."""


@pytest.fixture(scope="module")
def resumed_run(
    interrupted_run: InterruptedRun, tiny_model: Path, teacher_process: Callable[[Path], tuple[str, int]]
) -> Iterator[ResumedRun]:
    folder, run, port = interrupted_run.folder, interrupted_run.run, free_port()
    newest = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    config = write_run(folder, tiny_model, **ADAPTERS, teachers={"started": {"model": str(tiny_model), "threads": 1}})
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    names = ["started", None] * 4
    changed = [json.dumps({**row, "teacher": name}) for row, name in zip(rows, names, strict=True)]
    (folder / "train.jsonl").write_text("\n".join(changed))
    url, pid = teacher_process(config)
    settings = (f"run.metrics_port={port}", f"teacher.url={url}", "teacher.request_timeout_s=5")
    began = time.monotonic()
    with started_run(config, *settings, "--resume", "--accept-changes") as process:
        yield ResumedRun(process, run, newest + 1, port, url, pid, began)


NEEDS_MORE = ("rejected", "accuracy")
"""Series of events that the run does not have: refused requests, and evaluations."""


@pytest.mark.skipif(prometheus_server.PROGRAM is None, reason="no prometheus on PATH")
def test_the_dashboards_queries_find_a_run_in_a_real_prometheus(resumed_run: ResumedRun, tmp_path: Path) -> None:
    with prometheus_server.scraping(f"127.0.0.1:{resumed_run.metrics_port}", tmp_path, free_port()) as url:
        wait_for_step(resumed_run.run, resumed_run.process, resumed_run.first_step + 1)
        prometheus_server.wait_until_found(url, "rate(opcd_teacher_tokens_scored_total[20s]) > 0", 60)
        found = {}
        for query in queries():
            asked = query.replace("$__rate_interval", "20s").replace("$run", ".*")
            found[query] = prometheus_server.answers(url, asked)  # every query is one that Prometheus takes
    ours = {query: series for query, series in found.items() if "opcd_" in query}
    assert [query for query, series in ours.items() if not series and not any(n in query for n in NEEDS_MORE)] == []
    assert {series["metric"]["run"] for series in ours['opcd_run_step{run=~"$run"}']} == {"tiny"}


def test_an_interrupted_run_resumes_and_a_lost_teacher_ends_it_in_one_clear_line(
    interrupted_run: InterruptedRun, resumed_run: ResumedRun
) -> None:
    """The last test of `resumed_run`."""
    process, run = resumed_run.process, resumed_run.run
    wait_for_step(run, process, resumed_run.first_step + 1)
    children = descendants(process.pid)
    os.kill(resumed_run.teacher_pid, signal.SIGKILL)
    printed, errors = process.communicate()
    assert process.returncode == 2
    assert "resumed from" in printed
    assert "to go on from step" in printed  # a failed run keeps its last whole step, too
    messages = [line for line in errors.splitlines() if line.startswith("opcd: ")]
    assert len(messages) == 1
    assert resumed_run.teacher_url in messages[0]
    assert "Traceback" not in errors
    assert json.loads((run / "summary.json").read_text())["outcome"].startswith("failed: TeacherError")
    assert_nothing_left(children)
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) > resumed_run.first_step
    assert lines[-1]["kl/lower_bound"] < lines[0]["kl/lower_bound"]
    assert max(line["parity/max_nats"] for line in lines) <= 2e-4
    check_whole_run(run, lines, resumed_run.first_step - 1)
    total = json.loads((run / "summary.json").read_text())["time_s"]["total"]
    assert total < interrupted_run.seconds + time.monotonic() - resumed_run.began


def check_whole_run(run: Path, lines: list[dict[str, float]], earlier: int) -> None:
    """Seconds, shares, trace and simulation are of the whole run, `earlier` steps before the interruption, each step
    once.
    """
    assert [line["run/part"] for line in lines] == [1] * earlier + [2] * (len(lines) - earlier)
    summary = json.loads((run / "summary.json").read_text())
    seconds = summary["time_s"]
    assert seconds["total"] > seconds["start"] + sum(line["time/total_s"] for line in lines)
    for stage in ("rollout", "score", "accumulate", "step", "sync", "parity"):
        assert seconds[stage] == pytest.approx(sum(line.get(f"time/{stage}_s", 0.0) for line in lines), abs=2e-3)
    idle = sum(line["time/trainer_idle_ratio"] * line["time/total_s"] for line in lines)
    assert summary["trainer_idle_ratio"] == pytest.approx(idle / sum(line["time/total_s"] for line in lines), abs=1e-4)
    events = read_trace(run / "trace.json")
    samples = Counter(event["args"]["sample"] for event in events if event["name"] == "rollout")
    assert set(samples.values()) == {1}
    assert {int(sample.split("/")[0]) for sample in samples} == set(range(len(lines)))
    for stage in ("step", "sync", "parity"):  # a resume, or a replaced worker, gets a version again; that ends no step
        versions = Counter(event["args"].get("version") for event in events if event["name"] == stage)
        assert (versions.pop(None, 0) > 0) == (stage != "step")
        assert versions == dict.fromkeys(range(1, len(lines) + 1), 1)
    table = CliRunner().invoke(app, ["simulate", "--from", str(run), f"simulation.steps={len(lines)}"])
    assert table.exit_code == 0, table.output
    simulated = next(float(line.split()[1]) for line in table.stdout.splitlines() if line.split()[:1] == ["step"])
    warm = [line["time/total_s"] for line in lines if line["weight_version"] not in (1, earlier + 1)]
    assert min(warm) / 3 < simulated < 3 * max(warm)
