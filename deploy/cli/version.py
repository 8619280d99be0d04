"""``opcd --version``."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the option to the command itself."""
    app.callback()(_options)


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _show(asked), help="Show the version.")
    ] = False,
) -> None:
    """On-policy context distillation: vLLM rollouts, a shared teacher server, a DeepSpeed learner."""


def _show(asked: bool) -> None:
    if asked:
        typer.echo(f"opcd {importlib.metadata.version('opcd')}")
        raise typer.Exit
