"""Environment of a run, stored with its results: interpreter, machine, state of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""Parent folder of these packages: a checkout, or an environment's site-packages."""


def environment() -> dict[str, Any]:
    """Content of ``environment.json``."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        **({} if (found := commit(ROOT)) is None else {"git": found}),
    }


def commit(root: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `root`, and whether tracked files differ from it; None if `root` is no checkout's top.

    An installed package may lie inside another project's checkout, whose commit says nothing about this code.
    """
    top = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    if top is None or len(top) != 2 or Path(top[0]).resolve() != root:
        return None
    return {"commit": top[1], "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _git(root: Path, *arguments: str) -> list[str] | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.splitlines() if result.returncode == 0 else None
