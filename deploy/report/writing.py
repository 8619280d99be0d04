"""Writes pages to disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deploy.report.comparison import comparison_page
from deploy.report.load_run import read_run
from deploy.report.page import run_page

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of a run and return its path.

    Raises ReportError if `folder` is no run's folder, OSError if the page cannot be written.
    """
    path = folder / REPORT
    _replace(path, run_page(read_run(folder)))
    return path


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of several runs to `path`. Raises as `write_report`."""
    _replace(path, comparison_page([read_run(folder) for folder in folders]))
    return path


def _replace(path: Path, text: str) -> None:
    """Write by rename, so a browser never loads half a page."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
