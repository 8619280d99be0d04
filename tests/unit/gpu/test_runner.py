"""The runner of the GPU check-up: whatever a check does, the others run, and no process is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.report import Result
from tests.gpu.runner import Check, Runner
from tests.support.processes import wait_until_gone


def check(name: str, limit_s: float = 60.0, *needs: str, gpus: int = 0) -> Check:
    return Check(name, f"tests.support.faulty_checks:{name}", limit_s, "a check", needs, gpus)


def run(folder: Path, *checks: Check, together: bool = True, limit_s: float = 120.0, without: str = "") -> list[Result]:
    seen: list[Result] = []
    runner = Runner(
        place={"device": "cpu", "sizes": "small", "folder": str(folder)},
        gpus=0,
        log=folder / "log.txt",
        without=[without],
        together=together,
        report=seen.append,
    )
    results = runner.run(checks, limit_s)
    assert seen == results
    assert [result.check for result in results] == [one.name for one in checks]
    return results


@pytest.mark.parametrize("together", [True, False])
def test_every_fault_is_a_verdict_and_the_next_checks_run(tmp_path: Path, together: bool) -> None:
    checks = [check("raises"), check("memory"), check("dies"), check("good")]
    raised, memory, died, good = run(tmp_path, *checks, together=together)
    assert raised.reason == "ValueError: two lines"
    assert memory.reason == "out of memory: CUDA out of memory. Tried to allocate 5 GiB"
    assert died.reason == "the process ended by signal 9: the last words"
    for result in (raised, memory, died):
        assert result.verdict == "FAIL"
        assert [figure.name for figure in result.figures] == ["before"]
    assert (good.verdict, good.reason) == ("OK", "")


def test_a_hanging_check_is_ended_with_its_processes(tmp_path: Path) -> None:
    hung, good = run(tmp_path, check("hangs", 6), check("good"))
    assert hung.verdict == "FAIL"
    assert hung.reason.startswith("not done after 6 s")
    assert good.verdict == "OK"
    assert wait_until_gone({int((tmp_path / "pid").read_text())}, 20)


def test_a_check_that_cannot_run_is_skipped_with_the_reason(tmp_path: Path) -> None:
    results = run(
        tmp_path, check("good", 60, "no_such_package"), check("good", gpus=2), check("good", 60, "ray"), without="ray"
    )
    assert [result.verdict for result in results] == ["SKIP"] * 3
    assert [result.reason for result in results] == [
        "not installed: no_such_package",
        "needs 2 GPUs, this check-up has 0",
        "not installed: ray",
    ]


def test_a_hidden_package_cannot_be_imported(tmp_path: Path) -> None:
    (result,) = run(tmp_path, check("imports"), without="ray")
    assert result.reason.startswith("ModuleNotFoundError: No module named 'ray'")


def test_without_time_left_a_check_is_skipped(tmp_path: Path) -> None:
    (result,) = run(tmp_path, check("good"), limit_s=1.0)
    assert (result.verdict, result.reason) == ("SKIP", "no time is left of the check-up's 1 s")
