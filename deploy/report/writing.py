"""Pages on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deploy.report.comparison import comparison_page
from deploy.report.load_run import read_run
from deploy.report.page import run_page

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """(Re)write ``report.html`` of a run; returns where. Raises ReportError where `folder` is no run's, OSError where
    it cannot be written.
    """
    path = folder / REPORT
    _replace(path, run_page(read_run(folder)))
    return path


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of several runs to `path`. Raises as `write_report`."""
    _replace(path, comparison_page([read_run(folder) for folder in folders]))
    return path


def _replace(path: Path, text: str) -> None:
    """By rename: a browser never meets half a page."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
