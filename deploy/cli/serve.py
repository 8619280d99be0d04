"""``opcd serve``: a run's weights behind vLLM's server."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.config.model import ConfigError
from common.serving import SERVER, exported_weights, server_arguments
from deploy.cli.errors import known_errors


def serve(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/demo.")],
    weights: Annotated[
        str | None, typer.Option(help="Folder in the run to serve, such as best; default: checkpoint, else best.")
    ] = None,
    show: Annotated[bool, typer.Option("--print", help="Print vLLM's command and start nothing.")] = False,
) -> None:
    """Serve the distilled student with OpenAI's API, through vLLM's own server.

    All further options go to vLLM, for example --port 8001 or --max-model-len 4096.
    """
    with known_errors(ConfigError):
        folder = exported_weights(run, weights)
    import torch

    arguments = [*server_arguments(folder, run.resolve().name, gpu=torch.cuda.is_available()), *context.args]
    command = ["-m", SERVER, *arguments]
    if show:
        typer.echo(shlex.join(["python", *command]))
        return
    os.execv(sys.executable, [sys.executable, *command])


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
