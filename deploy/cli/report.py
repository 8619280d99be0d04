"""``opcd report``: the HTML page of a run, or of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import chat, inspect
from deploy.cli.errors import known_errors

COMPARISON = "comparison.html"


def register(app: typer.Typer) -> None:
    """Add the commands that look at runs: report, inspect, chat."""
    for command in (report, inspect.inspect, chat.chat):
        app.command()(command)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, such as runs/demo.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the page of several runs; default: comparison.html in the current folder.", dir_okay=False
        ),
    ] = None,
) -> None:
    """Write the report.html of one run again, or one page that compares several runs.

    Also works for a run that is still going, failed or was killed: the page says which files were missing.
    """
    from deploy.report.load_run import ReportError
    from deploy.report.writing import write_comparison, write_report

    with known_errors(ReportError, OSError):
        alone = len(runs) == 1 and out is None
        typer.echo(str(write_report(runs[0]) if alone else write_comparison(runs, out or Path(COMPARISON))))
