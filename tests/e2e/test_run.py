"""Whole runs on real parts: rollouts in vLLM, a teacher over HTTP, DeepSpeed, weights back; and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.support import prometheus_server
from tests.support.dashboard import asked_of, exported_by, missing, queries
from tests.support.processes import alive, command_of, descendants
from tests.support.runs import metric_lines, started_run, wait_for_step
from tests.support.teacher_running import free_port

pytestmark = pytest.mark.timeout(300)


def assert_nothing_left(pids: set[int]) -> None:
    """All of `pids` end within 20 s."""
    assert pids
    deadline = time.monotonic() + 20
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(pids)


def test_kl_falls_over_a_whole_run(write_config: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    port = free_port()
    with started_run(write_config(), f"run.metrics_port={port}") as process:
        wait_for_step(run, process, 1)
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        children = descendants(process.pid)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    summary = json.loads((run / "summary.json").read_text())
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert summary["kl_last"] < 0.7 * summary["kl_first"]
    exported = exported_by(page)
    assert missing(asked_of("opcd_run_"), exported) == []  # of the Grafana dashboard
    assert exported["opcd_teacher_tokens_scored_total"] == {"run", "teacher"}  # the run's own
    assert summary["outcome"] == "finished"
    assert summary["base"]["n"] == summary["in_context"]["n"] == summary["final"]["n"] == 4
    assert 0 < summary["parity_max_nats"] <= 2e-4
    assert set(summary["time_s"]) >= {"rollout", "score", "accumulate", "step", "sync", "parity", "total"}
    assert max(line["mismatch/rms"] for line in lines) < 1e-4  # engine and learner see the same tokens and positions
    assert "gap closed" in output
    assert_nothing_left(children)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(run / "checkpoint")
    trained = AutoModelForCausalLM.from_pretrained(run / "checkpoint").state_dict()
    assert not any(value.isnan().any() for value in trained.values())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["set"] for sample in samples} == {"base", "in_context", "valid", "final"}
    tokens = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    assert [line["step"] for line in tokens] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]  # run.token_samples of each
    assert all(len(line["pieces"]) == len(line["kl"]) == line["response_tokens"] for line in tokens)
    report = (run / "report.html").read_text()
    assert f"Step 6, row {tokens[-1]['row']}" in report
    assert "could not be read" not in report

    again = [sys.executable, "-m", "deploy.cli.main", "evaluate", str(tmp_path / "run.yaml")]
    told = subprocess.run([*again, "--checkpoint", str(run / "checkpoint")], capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    final = {sample["id"]: sample["answer"] for sample in samples if sample["set"] == "final"}
    assert {s["id"]: s["answer"] for s in answers if s["set"] == "without context"} == final
    assert "with context" in told.stdout


NEEDS_MORE = ("rejected", "accuracy")
"""Series of what does not happen in the run below: nothing is refused, nothing is asked."""


@pytest.mark.skipif(prometheus_server.PROGRAM is None, reason="no prometheus on PATH")
def test_the_dashboards_queries_find_a_run_in_a_real_prometheus(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    port = free_port()
    config = write_config(learner={"steps": 1000}, eval={"every": 0}, data={"eval": None, "valid": None})
    with (
        prometheus_server.scraping(f"127.0.0.1:{port}", tmp_path, free_port()) as url,
        started_run(config, f"run.metrics_port={port}") as process,
    ):
        wait_for_step(tmp_path / "runs/tiny", process, 2)
        prometheus_server.wait_until_found(url, "rate(opcd_teacher_tokens_scored_total[20s]) > 0", 60)
        found = {}
        for query in queries():
            asked = query.replace("$__rate_interval", "20s").replace("$run", ".*")
            found[query] = prometheus_server.answers(url, asked)  # every query is one that Prometheus takes
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    ours = {query: series for query, series in found.items() if "opcd_" in query}
    assert [query for query, series in ours.items() if not series and not any(n in query for n in NEEDS_MORE)] == []
    assert {series["metric"]["run"] for series in ours['opcd_run_step{run=~"$run"}']} == {"tiny"}


def test_ctrl_c_keeps_what_was_done_and_leaves_no_process(write_config: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    with started_run(write_config(), "learner.steps=1000", "eval.every=0") as process:
        wait_for_step(run, process, 2)
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted after" in output
    assert "Traceback" not in output + errors
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"
    assert summary["steps"] >= 2
    assert (run / "checkpoint/model.safetensors").exists()
    assert_nothing_left(children)


def test_a_lost_teacher_ends_the_run_in_one_clear_line(
    write_config: Callable[..., Path], tmp_path: Path, teacher_process: Callable[[Path], tuple[str, int]]
) -> None:
    run = tmp_path / "runs/tiny"
    path = write_config(learner={"steps": 1000}, eval={"every": 0})
    url, pid = teacher_process(path)
    with started_run(path, f"teacher.url={url}", "teacher.request_timeout_s=5") as process:
        wait_for_step(run, process, 1)
        children = descendants(process.pid)
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=90)
    assert process.returncode == 2
    lines = [line for line in errors.splitlines() if line.startswith("opcd: ")]
    assert len(lines) == 1
    assert url in lines[0]
    assert "Traceback" not in errors
    assert json.loads((run / "summary.json").read_text())["outcome"].startswith("failed: TeacherError")
    assert_nothing_left(children)


def test_a_killed_driver_leaves_no_process(write_config: Callable[..., Path], tmp_path: Path) -> None:
    with started_run(write_config(), "learner.steps=1000", "eval.every=0") as process:
        wait_for_step(tmp_path / "runs/tiny", process, 1)
        children = descendants(process.pid)
        # Ray's own two agents hold neither a device nor a model; they give up by themselves a minute later.
        agents = {
            pid for pid in children if command_of(pid).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
        }
        process.kill()
        process.communicate()
    assert len(agents) == 2
    assert_nothing_left(children - agents)
