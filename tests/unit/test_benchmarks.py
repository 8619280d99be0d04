"""The benchmark runner: chosen benchmarks, figures, history, failures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import bench_e2e_accuracy
from tests.benchmarks.figures import THREADS, Figure

FIGURE = "Figure(1.5, 's', 'once', at_most=2)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmarks of a temporary repository, which a test writes."""
    home = tmp_path / "tests" / "benchmarks"
    home.mkdir(parents=True)
    for name in (home.parent, home):
        (name / "__init__.py").touch()
    source = Path(benchmarks.__file__).with_name("figures.py")
    (home / "figures.py").write_text(source.read_text())
    monkeypatch.setattr(benchmarks, "known", lambda: sorted(p.stem.removeprefix("bench_") for p in home.glob("b*.py")))
    monkeypatch.setattr(benchmarks, "measure", lambda *name, measure=benchmarks.measure: measure(*name, tmp_path))
    monkeypatch.setattr(benchmarks, "conditions", lambda: {"commit": "abc", "machine": {"cpu": "z80", "cores": 1}})
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path)
    return home


def write(folder: Path, name: str, body: str) -> None:
    text = f"import os\nfrom tests.benchmarks.figures import Figure\ndef run():\n    {body}\n"
    (folder / f"bench_{name}.py").write_text(text)


def history(folder: Path) -> list[dict[str, Any]]:
    """The lines of the figures that tests write."""
    lines = [json.loads(line) for line in (folder.parents[1] / benchmarks.HISTORY).read_text().splitlines()]
    return [line for line in lines if not line["name"].startswith("bench.")]


def test_a_figure_derives_target_and_verdict_from_its_bound() -> None:
    below, above = Figure(3, "s", "once", at_most=2), Figure(3, "x", "once", at_least=2)
    assert (below.target, below.ok, below.times_target) == ("at most 2", False, 1.5)
    assert (above.target, above.ok, above.times_target) == ("at least 2", True, pytest.approx(2 / 3))
    assert Figure(2, "s", "once", at_most=2).ok
    assert Figure(2, "s", "once", at_least=2).ok
    never, free = Figure(0, "x", "once", at_least=1), Figure(3, "s", "once")
    assert (never.ok, never.times_target) == (False, math.inf)
    assert (free.target, free.ok, free.times_target) == (None, None, None)
    assert Figure(3, "s", "once", load=0.25).method == f"once; {THREADS} threads, load average 0.2"


@pytest.mark.parametrize("fields", [{"at_most": 1, "at_least": 1}, {"value": math.nan}, {"value": math.inf}])
def test_what_is_no_figure_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"one bound|no value"):
        Figure(**{"value": 1.0, "unit": "s", "how": "once", **fields})  # type: ignore[arg-type]


def test_figures_are_kept_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "one", "return {'one.time': Figure(1.5, 's', 'once', at_most=2, limit='1 by light', load=3.0)}")
    write(folder, "two", "return {'two.process': Figure(os.getpid(), 'id', 'once')}")
    assert benchmarks.main([]) == 0
    first, second = history(folder)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "commit": "abc",
        "machine": {"cpu": "z80", "cores": 1},
        "name": "one.time",
        "value": 1.5,
        "unit": "s",
        "how": f"once; {THREADS} threads, load average 3.0",
        "at_most": 2,
        "at_least": None,
        "limit": "1 by light",
        "load": 3.0,
    }
    assert second["name"] == "two.process"
    output = capsys.readouterr().out
    for part in ("one.time", "1.5", "at most 2", "1 by light", "ok", "load average 3.0"):
        assert part in output


def test_each_benchmark_has_a_new_process_and_says_how_long_it_took(folder: Path) -> None:
    for name in ("one", "two"):
        write(folder, name, f"return {{'{name}': Figure(os.getpid(), 'id', 'once')}}")
    assert benchmarks.main([]) == 0
    assert len({line["value"] for line in history(folder)}) == 2
    lines = [json.loads(line) for line in (folder.parents[1] / benchmarks.HISTORY).read_text().splitlines()]
    seconds = {line["name"]: line["value"] for line in lines if line["name"].startswith("bench.")}
    assert list(seconds) == ["bench.one_s", "bench.two_s", "bench.whole_s"]
    assert seconds["bench.whole_s"] >= seconds["bench.one_s"] + seconds["bench.two_s"] > 0


def test_a_repeated_benchmark_adds_to_the_history(folder: Path) -> None:
    for name in ("one", "two"):
        write(folder, name, f"return {{'{name}': {FIGURE}}}")
    assert benchmarks.main([]) == 0
    write(folder, "one", f"return {{'one': {FIGURE.replace('1.5', '1.75')}}}")
    write(folder, "two", "raise SystemExit(3)")
    assert benchmarks.main(["one"]) == 0
    assert [(line["name"], line["value"]) for line in history(folder)] == [("one", 1.5), ("two", 1.5), ("one", 1.75)]


def test_the_long_ones_are_run_only_by_name(folder: Path) -> None:
    for name in ("one", *sorted(benchmarks.BY_NAME)):
        write(folder, name, f"return {{'{name}': {FIGURE}}}")
    assert benchmarks.main([]) == 0
    assert [line["name"] for line in history(folder)] == ["one"]
    assert benchmarks.main(sorted(benchmarks.BY_NAME)) == 0
    assert {line["name"] for line in history(folder)} == {"one", *benchmarks.BY_NAME}


@pytest.mark.parametrize("body", ["raise RuntimeError('no')", "return {}", "return {'x': {'value': 1}}"])
def test_a_failure_is_named_and_the_others_run(folder: Path, body: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "broken", body)
    write(folder, "well", f"return {{'well': {FIGURE}}}")
    assert benchmarks.main([]) == 1
    assert [line["name"] for line in history(folder)] == ["well"]
    assert "failed: broken" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "status"), [(2.5, 0), (4.0, 0), (4.5, 1)])
def test_a_missed_target_is_named_and_fails_only_at_twice_the_target(
    folder: Path, value: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "slow", f"return {{'slow': {FIGURE.replace('1.5', str(value))}}}")
    assert benchmarks.main([]) == status
    errors = capsys.readouterr().err
    assert "target missed: slow" in errors
    assert ("2 times worse than the target: slow" in errors) == bool(status)


def test_an_unknown_name_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, "one", f"return {{'one': {FIGURE}}}")
    assert benchmarks.main(["oen"]) == 2
    assert "no benchmark oen; there are: one" in capsys.readouterr().err


def test_the_history_names_commit_and_processor(tmp_path: Path) -> None:
    found = benchmarks.conditions()
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40
    assert found["machine"]["cores"] >= 1
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: Z80 @ 4 MHz\nflags: none\n")
    assert benchmarks.cpu_model(cpuinfo) == "Z80 @ 4 MHz"
    assert benchmarks.cpu_model(tmp_path / "none") != ""


@pytest.mark.parametrize(("step", "ratio"), [(4, 5.0), (None, 0.0)])
def test_a_run_that_never_reached_the_accuracy_counts_as_ratio_0(
    monkeypatch: pytest.MonkeyPatch, step: int | None, ratio: float
) -> None:
    """Otherwise a short run of ours without success looks fast."""
    reached = bench_e2e_accuracy.Reached
    monkeypatch.setattr(bench_e2e_accuracy, "ours", lambda seed: (reached(20.0, step if seed == 1 else 4), 0.9))
    monkeypatch.setattr(bench_e2e_accuracy, "theirs", lambda seed, enough: reached(100.0, 9))
    (figure,) = bench_e2e_accuracy.run().values()
    assert (figure.value, figure.ok) == (ratio, ratio >= 1)
