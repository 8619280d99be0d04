"""Execution of a comparison's runs: skipped, repeated, shown, logged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config.loader import dump_config
from common.telemetry.run_files import Progress
from deploy.compare.compare import compare, train_in_process
from deploy.compare.plan import PlannedRun, plan
from tests.support.comparisons import ALL, write_result


def run_all(runs: list[PlannedRun], root: Path, train: Callable[[PlannedRun, Path, Any], None]) -> dict[str, Any]:
    table = compare(runs, ALL, root, "opcd compare run.yaml", Progress(quiet=True), train)
    assert table.is_file()
    return json.loads((root / "compare.json").read_text())


def test_finished_runs_are_skipped_and_failed_ones_repeated(path: Path, tmp_path: Path) -> None:
    runs, started = plan(path, [], ["opcd", "pg"], [0, 1]), list[str]()

    def train(run: PlannedRun, log: Path, on_line: Any) -> None:
        started.append(run.name)
        log.write_text("step 1/2\nopcd: out of memory\nbye\n")
        if run.method == "opcd":
            write_result(run, "1110")

    result = run_all(runs, tmp_path / "root", train)
    assert started == ["opcd-0", "pg-0", "opcd-1", "pg-1"]
    assert result["arms"]["opcd"]["runs"] == 2
    assert result["arms"]["pg"]["runs"] == 0
    assert "out of memory" in result["arms"]["pg"]["faults"][0]
    started.clear()
    run_all(runs, tmp_path / "root", train)
    assert started == ["pg-0", "pg-1"]


def test_a_runs_steps_are_shown_once_a_minute(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def train(run: PlannedRun, log: Path, on_line: Any) -> None:
        on_line("starting 1 teacher")
        for step in range(1, 10):
            clock[0] += 25
            on_line(f"step {step}/9  kl 1.0")
        log.write_text("opcd: bye\n")

    compare(plan(path, [], ["opcd"], [0]), ["opcd"], tmp_path / "root", "opcd compare", Progress(), train)
    shown = [line for line in capsys.readouterr().out.splitlines() if ": step" in line]
    assert shown == [f"[1/1] opcd-0: step {step}/9  kl 1.0" for step in (3, 6, 9)]


def test_the_result_of_another_configuration_does_not_count(path: Path, tmp_path: Path) -> None:
    (old,) = plan(path, ["learner.lr=1e-3"], ["opcd"], [0])
    write_result(old, "1111")
    (run,) = plan(path, [], ["opcd"], [0])
    result = run_all([run], tmp_path / "root", lambda run, log, on_line: log.write_text("opcd: no GPU\n") and None)
    found = result["arms"]["opcd"]
    assert (found["runs"], found["planned"], found["faults"]) == (0, 1, [f"seed 0: no GPU ({_log(tmp_path)})"])


def _log(folder: Path) -> Path:
    return folder / "root/logs/opcd-0.log"


def test_the_table_is_written_after_every_run(path: Path, tmp_path: Path) -> None:
    runs = plan(path, [], ["opcd", "pg"], [0])

    def train(run: PlannedRun, log: Path, on_line: Any) -> None:
        if run.method == "pg":
            raise KeyboardInterrupt
        write_result(run, "1110")

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, tmp_path / "root", train)
    result = json.loads((tmp_path / "root/compare.json").read_text())
    assert result["arms"]["opcd"]["accuracy"] == 0.75
    assert result["arms"]["pg"]["faults"] == ["seed 0: not run yet"]


def test_a_run_is_a_process_whose_lines_are_shown_and_logged(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = plan(path, [], ["opcd"], [0])
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def fake(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        return popen(
            [sys.executable, "-c", "import sys; print('step 1/2'); print('opcd: x', file=sys.stderr)"], **kwargs
        )

    monkeypatch.setattr(subprocess, "Popen", fake)
    shown: list[str] = []
    train_in_process(run, tmp_path / "opcd-0.log", shown.append)
    assert sorted(shown) == ["opcd: x", "step 1/2"]
    assert sorted((tmp_path / "opcd-0.log").read_text().splitlines()) == sorted(shown)
    assert commands == [[sys.executable, "-m", "learner.train", str(tmp_path / "opcd-0.yaml")]]
    assert run.config is not None
    assert (tmp_path / "opcd-0.yaml").read_text() == dump_config(run.config)
