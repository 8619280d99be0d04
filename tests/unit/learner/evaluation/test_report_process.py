"""The report at the end of a run: written on every way out, and never a reason for the run to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.evaluation import report_process
from learner.evaluation.report_process import report_at_end, write_report
from tests.support.report_run import write_run


def test_a_run_that_raises_has_its_page(tmp_path: Path) -> None:
    run, messages = tmp_path / "run", list[str]()

    def fail() -> None:
        with report_at_end(run, messages.append):
            write_run(run)
            raise RuntimeError("the run's own")

    with pytest.raises(RuntimeError, match="the run's own"):
        fail()
    assert "<h1>" in (run / "report.html").read_text()
    assert messages == []


def test_a_folder_without_a_run_gets_no_report(tmp_path: Path) -> None:
    messages = list[str]()
    with report_at_end(tmp_path / "run", messages.append):
        pass
    assert messages == []
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    messages = list[str]()
    run = write_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with report_at_end(run, messages.append):
        pass
    (line,) = messages
    assert line.startswith("WARNING: report.html was not written: ")
    assert "report.html" in line.partition("written: ")[2]


def test_a_page_that_takes_too_long_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_process, "TIMEOUT_S", 0.01)
    assert "was not written within" in str(write_report(write_run(tmp_path / "run")))
