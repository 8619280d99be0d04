"""The page at the end of a run, written by a process of its own: a page must never cost a run."""

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
def reported(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Whatever way the block ends, `folder` gets its page where it is a run's by then; `say` hears why it did not."""
    try:
        yield
    finally:
        if (folder / "config.yaml").is_file():
            fault = write_report_apart(folder)
            if fault is not None:
                say(f"WARNING: {fault}")


def write_report_apart(folder: Path) -> str | None:
    """Write ``report.html`` of the run in `folder`; why there is none, or None where it is there. Never raises for
    what is wrong with the page.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deploy.report", str(folder.absolute())],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except subprocess.TimeoutExpired:
        return f"report.html was not written within {TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    return f"report.html was not written: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
