"""The folder of a finished run: neither overwritten by accident nor continued as another run.

`tests.faults.test_faults` resumes killed runs, `tests.e2e.test_run` an interrupted one.
"""

from __future__ import annotations

import pytest

from learner.train import main
from tests.support.runs import ReferenceRun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds a checkpoint of step 6: --resume"),
        (["loss.top_k=32", "--resume"], "loss.top_k: the checkpoint has 64, this run has 32"),
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
