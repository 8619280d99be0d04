"""Writes a run's report in a child process, so that a failing report never fails the run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0


@contextmanager
def report_at_end(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Write the report of `folder` when the block ends, if it holds a run by then; `warn` gets a failure's reason."""
    try:
        yield
    finally:
        if (folder / "config.yaml").is_file():
            error = write_report(folder)
            if error is not None:
                warn(f"WARNING: {error}")


def write_report(folder: Path) -> str | None:
    """Write ``report.html`` of the run in `folder`. Returns the reason of a failure, None on success."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.run(
            [sys.executable, "-m", "deploy.report", str(folder.absolute())],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        return f"report.html was not written within {TIMEOUT_S:.0f} s"
    if child.returncode == 0:
        return None
    return f"report.html was not written: {(child.stderr.strip().splitlines() or ['no message'])[-1]}"
