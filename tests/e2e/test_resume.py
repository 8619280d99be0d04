"""The folder of a finished run: neither replaced by accident nor continued as another run.

`tests.faults.test_faults` resumes killed runs, `tests.e2e.test_run` an interrupted one.
"""

from __future__ import annotations

import pytest

from common.telemetry.run_folder import LOCK, RUN_FILES
from learner.train import main
from tests.support.runs import ReferenceRun


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
