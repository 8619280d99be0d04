"""Whole runs on real parts (vLLM, a teacher over HTTP, DeepSpeed), and how runs end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import prometheus_server
from tests.support.dashboard import asked_of, exported_by, missing, queries
from tests.support.processes import assert_nothing_left, descendants, free_port
from tests.support.runs import ReferenceRun, finish, metric_lines, started_run, wait_for_step, write_run

pytestmark = pytest.mark.timeout(300)


def test_kl_falls_over_a_whole_run(reference: ReferenceRun) -> None:
    run = reference.run
    assert_nothing_left(reference.processes)
    summary = json.loads((run / "summary.json").read_text())
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert summary["kl_last"] < 0.7 * summary["kl_first"]
    exported = exported_by(reference.metrics_page)
    assert missing(asked_of("opcd_run_"), exported) == []  # of the Grafana dashboard
    assert exported["opcd_teacher_tokens_scored_total"] == {"run", "teacher"}  # relayed from the run's teacher
    assert summary["outcome"] == "finished"
    assert summary["base"]["n"] == summary["in_context"]["n"] == summary["final"]["n"] == 4
    assert 0 < summary["parity_max_nats"] <= 2e-4
    assert set(summary["time_s"]) >= {"rollout", "score", "accumulate", "step", "sync", "parity", "total"}
    assert max(line["mismatch/rms"] for line in lines) < 1e-4  # engine and learner see the same tokens and positions
    assert "gap closed" in reference.output


def test_a_run_leaves_checkpoints_exports_samples_and_a_report(reference: ReferenceRun) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = reference.run
    AutoTokenizer.from_pretrained(run / "checkpoint")
    trained = AutoModelForCausalLM.from_pretrained(run / "checkpoint").state_dict()
    assert not any(value.isnan().any() for value in trained.values())
    exports = ["step-000001", "step-000002", "step-000004", "step-000006"]
    assert sorted(path.name for path in (run / "exports").iterdir()) == exports
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000005", "step-000006"]
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads((run / "best/best.json").read_text()) == summary["best_on_valid"]
    assert (run / "best/model.safetensors").exists()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {sample["set"] for sample in samples} == {"base", "in_context", "valid", "final"}
    tokens = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    assert [line["step"] for line in tokens] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]  # run.token_samples of each
    assert all(len(line["pieces"]) == len(line["kl"]) == line["response_tokens"] for line in tokens)
    report = (run / "report.html").read_text()
    assert f"Step 6, row {tokens[-1]['row']}" in report
    assert "could not be read" not in report


def test_a_checkpoint_is_evaluated_like_the_end_of_its_run(
    reference: ReferenceRun, shared_cluster: dict[str, str]
) -> None:
    run = reference.run
    command = [sys.executable, "-m", "deploy.cli.main", "evaluate", str(reference.config), "--checkpoint"]
    done = subprocess.run(
        [*command, str(run / "checkpoint")], capture_output=True, text=True, check=True, env=shared_cluster
    )
    answers = [json.loads(line) for line in (run / "evaluate/samples.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    final = {sample["id"]: sample["answer"] for sample in samples if sample["set"] == "final"}
    assert {s["id"]: s["answer"] for s in answers if s["set"] == "without context"} == final
    assert "with context" in done.stdout


@dataclass(frozen=True)
class LongRun:
    """A run that does not end by itself, with a teacher server and, for half of its rows, a teacher that it starts."""

    process: subprocess.Popen[str]
    folder: Path
    metrics_port: int
    teacher_url: str
    teacher_pid: int


@pytest.fixture(scope="module")
def long_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    teacher_process: Callable[[Path], tuple[str, int]],
) -> Iterator[LongRun]:
    folder, port = tmp_path_factory.mktemp("long"), free_port()
    started = {"started": {"model": str(tiny_model), "threads": 1}}
    config = write_run(folder, tiny_model, learner={"steps": 10_000}, eval={"every": 0}, teachers=started)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    names = ["started", None] * 4
    changed = [json.dumps({**row, "teacher": name}) for row, name in zip(rows, names, strict=True)]
    (folder / "train.jsonl").write_text("\n".join(changed))
    url, pid = teacher_process(config)
    remote = (f"teacher.url={url}", "teacher.request_timeout_s=5")
    with started_run(config, f"run.metrics_port={port}", *remote) as process:
        yield LongRun(process, folder / "runs/tiny", port, url, pid)


NEEDS_MORE = ("rejected", "accuracy")
"""Series of events that the run below does not have: refused requests, and evaluations."""


@pytest.mark.skipif(prometheus_server.PROGRAM is None, reason="no prometheus on PATH")
def test_the_dashboards_queries_find_a_run_in_a_real_prometheus(long_run: LongRun, tmp_path: Path) -> None:
    with prometheus_server.scraping(f"127.0.0.1:{long_run.metrics_port}", tmp_path, free_port()) as url:
        wait_for_step(long_run.folder, long_run.process, 2)
        prometheus_server.wait_until_found(url, "rate(opcd_teacher_tokens_scored_total[20s]) > 0", 60)
        found = {}
        for query in queries():
            asked = query.replace("$__rate_interval", "20s").replace("$run", ".*")
            found[query] = prometheus_server.answers(url, asked)  # every query is one that Prometheus takes
    ours = {query: series for query, series in found.items() if "opcd_" in query}
    assert [query for query, series in ours.items() if not series and not any(n in query for n in NEEDS_MORE)] == []
    assert {series["metric"]["run"] for series in ours['opcd_run_step{run=~"$run"}']} == {"tiny"}


def test_a_lost_teacher_ends_the_run_in_one_clear_line(long_run: LongRun) -> None:
    """The last test of `long_run`."""
    process = long_run.process
    wait_for_step(long_run.folder, process, 1)
    children = descendants(process.pid)
    os.kill(long_run.teacher_pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 2
    lines = [line for line in errors.splitlines() if line.startswith("opcd: ")]
    assert len(lines) == 1
    assert long_run.teacher_url in lines[0]
    assert "Traceback" not in errors
    assert json.loads((long_run.folder / "summary.json").read_text())["outcome"].startswith("failed: TeacherError")
    assert_nothing_left(children)


def test_ctrl_c_keeps_the_weights_and_leaves_no_process_and_the_run_resumes(
    write_config: Callable[..., Path], tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    """In a run whose adapters learn from the base model inside the learner: LoRA, no teacher server, weights as files,
    the learner's top-k, which is the whole vocabulary.
    """
    config = write_config(
        learner={"steps": 10_000, "lora": {"rank": 8, "publish": "adapter"}},
        teacher={"kind": "base"},
        rollout={"topk_from": "learner"},
        loss={"form": "exact", "top_k": 512},
        sync={"backend": "file"},
        checkpoint={"every": 2},
        eval={"every": 0},
    )
    run = tmp_path / "runs/tiny"
    with started_run(config) as process:
        wait_for_step(run, process, 3)
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        printed = finish(process, status=130)
    assert "interrupted after" in printed
    assert "Traceback" not in printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"
    assert summary["steps"] >= 2
    assert (run / "checkpoint/adapter_model.safetensors").exists()
    assert_nothing_left(children)

    newest = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    steps = newest + 2
    with started_run(config, f"learner.steps={steps}", "--resume", environment=shared_cluster) as process:
        printed = finish(process)
    assert "resumed from" in printed
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == list(range(1, steps + 1))
    assert lines[-1]["kl/lower_bound"] < lines[0]["kl/lower_bound"]
    for line in lines:
        assert line["mass/student_topk"] == pytest.approx(1, abs=1e-5)
        assert line["kl/tail"] == pytest.approx(0, abs=1e-9)
        assert line["loss"] == pytest.approx(line["kl/support"], rel=1e-5)
    assert max(line["parity/max_nats"] for line in lines) <= 2e-4
    stages = {key for line in lines for key in line if key.startswith("time/")}
    assert "time/score_s" in stages
