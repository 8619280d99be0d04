"""``python -m tests.benchmarks [ONLY ...]``: run benchmarks, keep their figures, print them against their targets.

A benchmark is a module ``tests/benchmarks/bench_NAME.py`` with ``run() -> dict[str, Measurement]``. They
run one after the other, each in a new process: a vLLM engine or a process group must not affect the next benchmark.
Figures are merged into ``runs/bench/results.json`` by name, so one benchmark can be repeated without losing the others.
The benchmarks of `BY_NAME` take a quarter of an hour each and run only by name.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.telemetry.run_files import write_json

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
RESULTS = Path("runs/bench/results.json")
BY_NAME = frozenset({"e2e_accuracy", "e2e_trl"})
"""Benchmarks that run only by name."""
KEYS = {"value", "unit", "target", "ok", "how"}
"""Keys of a measurement: figure, unit, target as text or None, target met, method."""

_CHILD = """
import importlib, json, sys
figures = importlib.import_module(sys.argv[1]).run()
open(sys.argv[2], "w").write(json.dumps(figures))
"""

Measurements = dict[str, dict[str, Any]]


class BenchmarkError(Exception):
    """A benchmark without figures, or an unknown one; the text is the reason."""


def known(folder: Path = FOLDER) -> list[str]:
    """Names of all benchmarks: ``teacher`` for ``bench_teacher.py``."""
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def choose(only: Sequence[str], names: Sequence[str]) -> list[str]:
    """Choose the benchmarks of `only`; if it is empty, all but `BY_NAME`. Raises BenchmarkError for an unknown name."""
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise BenchmarkError(f"no benchmark {', '.join(unknown)}; there are: {', '.join(names) or 'none'}")
    return [name for name in names if (name in only if only else name not in BY_NAME)]


def measure(module: str, root: Path = ROOT) -> Measurements:
    """Run one module's ``run()`` in a new process; its output passes through. Raises BenchmarkError."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "figures.json"
        status = subprocess.run([sys.executable, "-c", _CHILD, module, str(out)], cwd=root, check=False).returncode
        if status:
            raise BenchmarkError(f"ended with status {status}")
        return checked(json.loads(out.read_text()))


def checked(figures: Any) -> Measurements:
    """Return `figures` if each has exactly the keys of a measurement; raises BenchmarkError."""
    if not isinstance(figures, dict) or not figures:
        raise BenchmarkError("gave no figures")
    for name, figure in figures.items():
        if not isinstance(figure, dict) or set(figure) != KEYS:
            raise BenchmarkError(f"{name} is not a measurement: {figure!r}; its keys are {', '.join(sorted(KEYS))}")
    return figures


def merge(path: Path, figures: Mapping[str, Any]) -> None:
    """Add `figures` to the file, replacing those of the same name."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**before, **figures})


def table(figures: Measurements) -> Table:
    """One row a figure."""
    rows = Table("benchmark", "value", "unit", "target", "", box=None, header_style="bold")
    for name, figure in figures.items():
        value = figure["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        target = "-" if figure["target"] is None else str(figure["target"])
        verdict = "-" if figure["ok"] is None else "ok" if figure["ok"] else "missed"
        rows.add_row(name, shown, figure["unit"], target, verdict)
    return rows


def main(only: Sequence[str]) -> int:
    """Return 0 if every benchmark gave figures, 1 if one did not, 2 for an unknown name. A missed target is printed."""
    try:
        names = choose(only, known())
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if not names:
        print(f"benchmarks: there is no {FOLDER.relative_to(ROOT)}/bench_NAME.py")
    figures: Measurements = {}
    failed = []
    for name in names:
        print(f"bench_{name}", flush=True)
        try:
            taken = measure(f"tests.benchmarks.bench_{name}")
        except BenchmarkError as error:
            failed.append(name)
            print(f"bench_{name}: {error}", file=sys.stderr)
            continue
        merge(ROOT / RESULTS, taken)
        figures |= taken
    if figures:
        Console().print(table(figures))
        print(f"written to {RESULTS}")
    if failed:
        print(f"benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    missed = [name for name, figure in figures.items() if figure["ok"] is False]
    if missed:
        print(f"benchmarks: target missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    # Raised here, so that the benchmark that runs is ended too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
