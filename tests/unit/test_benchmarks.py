"""The benchmark runner: chosen benchmarks, valid figures, failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as benchmarks

FIGURE = {"value": 1.5, "unit": "s", "target": "<= 2", "ok": True, "how": "once"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmarks of a temporary repository, which a test writes."""
    home = tmp_path / "tests" / "benchmarks"
    home.mkdir(parents=True)
    for name in (home.parent, home):
        (name / "__init__.py").touch()
    monkeypatch.setattr(benchmarks, "known", lambda: sorted(p.stem.removeprefix("bench_") for p in home.glob("b*.py")))
    monkeypatch.setattr(benchmarks, "measure", lambda module, measure=benchmarks.measure: measure(module, tmp_path))
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    return home


def write(folder: Path, name: str, body: str) -> None:
    (folder / f"bench_{name}.py").write_text(f"import os\ndef run():\n    {body}\n")


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder.parents[1] / benchmarks.RESULTS).read_text())


def test_figures_are_kept_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "one", f"return {{'one/time': {FIGURE!r}}}")
    write(folder, "two", f"return {{'two/process': {{**{FIGURE!r}, 'value': os.getpid()}}}}")
    assert benchmarks.main([]) == 0
    kept = results(folder)
    assert kept["one/time"] == FIGURE
    output = capsys.readouterr().out
    for part in ("one/time", "1.5", "<= 2", "ok"):
        assert part in output


def test_each_benchmark_has_a_new_process(folder: Path) -> None:
    for name in ("one", "two"):
        write(folder, name, f"return {{'{name}': {{**{FIGURE!r}, 'value': os.getpid()}}}}")
    assert benchmarks.main([]) == 0
    assert len({figure["value"] for figure in results(folder).values()}) == 2


def test_one_is_repeated_without_losing_the_others(folder: Path) -> None:
    for name in ("one", "two"):
        write(folder, name, f"return {{'{name}': {FIGURE!r}}}")
    assert benchmarks.main([]) == 0
    write(folder, "one", f"return {{'one': {{**{FIGURE!r}, 'value': 9.0}}}}")
    write(folder, "two", "raise SystemExit(3)")
    assert benchmarks.main(["one"]) == 0
    assert results(folder) == {"one": {**FIGURE, "value": 9.0}, "two": FIGURE}


def test_the_long_ones_are_run_only_by_name(folder: Path) -> None:
    for name in ("one", *sorted(benchmarks.BY_NAME)):
        write(folder, name, f"return {{'{name}': {FIGURE!r}}}")
    assert benchmarks.main([]) == 0
    assert list(results(folder)) == ["one"]
    assert benchmarks.main(sorted(benchmarks.BY_NAME)) == 0
    assert set(results(folder)) == {"one", *benchmarks.BY_NAME}


def test_a_failure_is_named_and_the_others_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "broken", "raise RuntimeError('no')")
    write(folder, "well", f"return {{'well': {FIGURE!r}}}")
    assert benchmarks.main([]) == 1
    assert list(results(folder)) == ["well"]
    assert "failed: broken" in capsys.readouterr().err


def test_a_missed_target_is_named_and_fails_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "slow", f"return {{'slow': {{**{FIGURE!r}, 'ok': False}}}}")
    assert benchmarks.main([]) == 0
    assert "target missed: slow" in capsys.readouterr().err


def test_an_unknown_name_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "one", f"return {{'one': {FIGURE!r}}}")
    assert benchmarks.main(["oen"]) == 2
    assert "no benchmark oen; there are: one" in capsys.readouterr().err


@pytest.mark.parametrize("figures", [{}, None, {"x": 3}, {"x": {"value": 1}}, {"x": {**FIGURE, "more": 1}}])
def test_what_is_no_measurement_is_refused(figures: object) -> None:
    with pytest.raises(benchmarks.BenchmarkError):
        benchmarks.checked(figures)
