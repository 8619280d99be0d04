"""Errors that a command ends in with one line instead of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def known_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Errors whose text is all a user needs go to stderr, with exit status 2; all others keep their trace."""
    try:
        yield
    except kinds as error:
        typer.echo(f"opcd: {error}", err=True)
        raise typer.Exit(2) from None
