"""Errors that end a command with one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def known_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Print an error of these kinds on stderr and exit with status 2. Other errors keep their traceback."""
    try:
        yield
    except kinds as error:
        typer.echo(f"opcd: {error}", err=True)
        raise typer.Exit(2) from None
