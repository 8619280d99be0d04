"""A whole run on real parts (vLLM, a teacher over HTTP, DeepSpeed), and its folder afterwards.

The folder is neither replaced by accident nor continued as another run. `tests.faults.test_faults` resumes killed runs,
`tests.e2e.test_long_run` an interrupted one.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from common.telemetry.run_folder import LOCK, RUN_FILES
from learner.train import main
from tests.support.dashboard import asked_of, exported_by, missing
from tests.support.processes import assert_nothing_left
from tests.support.runs import ReferenceRun, metric_lines


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds a finished run of 6 steps: choose another name (run.name=tiny-2)"),
        (["loss.top_k=32", "learner.steps=7", "--resume"], "loss.top_k: the checkpoint has 64, this run has 32"),
    ],
)
def test_a_folder_of_another_run_is_refused_in_one_message(
    arguments: list[str],
    message: str,
    reference: ReferenceRun,
    shared_cluster: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in shared_cluster.items():
        monkeypatch.setenv(name, value)
    assert main([str(reference.config), *arguments]) == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_a_finished_run_is_not_resumed(reference: ReferenceRun, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.run.iterdir() if path.name != LOCK}
    assert main([str(reference.config), "--resume"]) == 0
    assert "is finished, 6 of 6 steps: nothing to resume" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in reference.run.iterdir() if path.name != LOCK} == before


def test_every_file_of_a_run_is_known_to_overwrite(reference: ReferenceRun) -> None:
    assert {path.name for path in reference.run.iterdir()} <= {LOCK, *RUN_FILES}
