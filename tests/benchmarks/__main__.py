"""``python -m tests.benchmarks [NAME ...]``: run benchmarks, print their figures, add them to the history.

A benchmark is a module ``tests/benchmarks/bench_NAME.py`` with ``run() -> Figures``. They run one after the other, each
in a new process: a vLLM engine or a process group must not affect the next benchmark. Each figure is one line of
``runs/bench/history.jsonl``. The benchmarks of `BY_NAME` run only by name.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.openmp import usable_cores
from common.telemetry.environment import commit
from tests.benchmarks.figures import Figure, Figures

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
HISTORY = Path("runs/bench/history.jsonl")
BY_NAME = frozenset({"e2e_accuracy", "e2e_trl", "loop_memory", "smoke"})
"""Benchmarks that run only by name: a quarter of an hour each, or small copies of others."""
WHOLE_S = 1800.0
"""Target for all benchmarks but those of `BY_NAME`."""
FAILED = 2.0
"""A figure that is this many times worse than its target fails the run. A smaller miss is printed."""

_CHILD = """
import dataclasses, importlib, json, sys
figures = importlib.import_module(sys.argv[1]).run()
open(sys.argv[2], "w").write(json.dumps({name: dataclasses.asdict(figure) for name, figure in figures.items()}))
"""


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


def measure(name: str, module: str, root: Path = ROOT) -> Figures:
    """Run one module's ``run()`` in a new process; its output passes through. Raises BenchmarkError.

    The last figure is how long it took.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "figures.json"
        began = time.perf_counter()
        status = subprocess.run([sys.executable, "-c", _CHILD, module, str(out)], cwd=root, check=False).returncode
        seconds = time.perf_counter() - began
        if status:
            raise BenchmarkError(f"ended with status {status}")
        figures = {figure: Figure(**fields) for figure, fields in json.loads(out.read_text()).items()}
    if not figures:
        raise BenchmarkError("gave no figures")
    return {**figures, f"bench.{name}_s": Figure(seconds, "s", f"wall time of {module}, its start included")}


def remember(path: Path, figures: Figures, context: dict[str, Any]) -> None:
    """Append a line a figure. `context` is what the figures have in common: commit and machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as history:
        for name, figure in figures.items():
            line = {"time": now, **context, "name": name, **asdict(figure), "how": figure.method}
            history.write(json.dumps(line, ensure_ascii=False) + "\n")


def conditions(root: Path = ROOT) -> dict[str, Any]:
    """Commit, with ``-dirty`` if tracked files differ from it, and machine."""
    found = commit(root)
    return {
        "commit": None if found is None else found["commit"] + ("-dirty" if found["changed"] else ""),
        "machine": {"cpu": cpu_model(), "cores": usable_cores()},
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the kernel gives no name."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def table(figures: Figures) -> Table:
    """One row a figure."""
    rows = Table("figure", "value", "unit", "target", "limit", "", box=None, header_style="bold")
    for name, figure in figures.items():
        verdict = "-" if figure.ok is None else "ok" if figure.ok else "missed"
        rows.add_row(name, f"{figure.value:.4g}", figure.unit, figure.target or "-", figure.limit or "-", verdict)
    return rows


def main(only: Sequence[str]) -> int:
    """Return 0; 1 if a benchmark gave no figures or a figure is `FAILED` times worse than its target; 2 for an unknown
    name.
    """
    try:
        names = choose(only, known())
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if not names:
        print(f"benchmarks: there is no {FOLDER.relative_to(ROOT)}/bench_NAME.py")
    figures: Figures = {}
    failed = []
    context = conditions()
    began = time.perf_counter()

    def keep(taken: Figures) -> None:
        remember(ROOT / HISTORY, taken, context)
        figures.update(taken)

    for name in names:
        print(f"bench_{name}", flush=True)
        try:
            taken = measure(name, f"tests.benchmarks.bench_{name}")
        except BenchmarkError as error:
            failed.append(name)
            print(f"bench_{name}: {error}", file=sys.stderr)
            continue
        for figure, one in taken.items():
            print(f"  {figure} = {one.value:.4g} {one.unit}: {one.method}", flush=True)
        keep(taken)
    if figures and not only and not failed:
        how = f"wall time of {len(names)} benchmarks"
        keep({"bench.whole_s": Figure(time.perf_counter() - began, "s", how, at_most=WHOLE_S)})
    return report(figures, failed)


def report(figures: Figures, failed: Sequence[str]) -> int:
    """Print the table and what went wrong; the exit status."""
    if figures:
        Console().print(table(figures))
        print(f"added to {HISTORY}")
    if failed:
        print(f"benchmarks: failed: {', '.join(failed)}", file=sys.stderr)
    missed = [name for name, figure in figures.items() if figure.ok is False]
    if missed:
        print(f"benchmarks: target missed: {', '.join(missed)}", file=sys.stderr)
    bad = [name for name, figure in figures.items() if (figure.times_target or 0.0) > FAILED]
    if bad:
        print(f"benchmarks: more than {FAILED:g} times worse than the target: {', '.join(bad)}", file=sys.stderr)
    return 1 if failed or bad else 0


if __name__ == "__main__":
    # Raised here, so that the benchmark that runs is ended too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
