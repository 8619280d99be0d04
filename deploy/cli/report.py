"""``opcd report``: the page of a run, or of several side by side."""

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
        typer.Option(help="Where the page of several runs goes; default: comparison.html here.", dir_okay=False),
    ] = None,
) -> None:
    """Write a run's report.html anew; of several runs, a page that compares them.

    Also for runs that go on, failed or were killed: the page says what it had to do without.
    """
    from deploy.report.load_run import ReportError
    from deploy.report.writing import write_comparison, write_report

    with known_errors(ReportError, OSError):
        alone = len(runs) == 1 and out is None
        typer.echo(str(write_report(runs[0]) if alone else write_comparison(runs, out or Path(COMPARISON))))
