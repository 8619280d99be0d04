"""``opcd --version``."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the option ``--version`` to `app`."""
    app.callback()(_options)


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda wanted: _show(wanted), help="Print the version."),
    ] = False,
) -> None:
    """On-policy context distillation: vLLM rollouts, a shared teacher server, a DeepSpeed learner."""


def _show(wanted: bool) -> None:
    if wanted:
        typer.echo(f"opcd {importlib.metadata.version('opcd')}")
        raise typer.Exit
