"""``opcd init``: a commented configuration for a user's own model, context and prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.config.loader import load_config
from common.config.model import ConfigError
from common.data.rows import DataError
from deploy.cli.errors import known_errors


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Configuration to write.")] = Path("own.yaml"),
    model: Annotated[str | None, typer.Option(help="Student: folder in Hugging Face format, or hub name.")] = None,
    context: Annotated[Path | None, typer.Option(help="Text file that only the teacher sees.")] = None,
    train: Annotated[Path | None, typer.Option(help="Prompts to train on: JSON lines or Parquet.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--eval", help='Held-out prompts with answers; "" for none.', show_default=False)
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs for the run; default: those of this machine.", min=0)] = None,
) -> None:
    """Write a commented configuration that fits a model, a context and prompts. Asks for what no option gives.

    Reads the rows and, if the model is on this machine, its tokenizer. Never replaces a file.
    """
    with known_errors(ConfigError, DataError, OSError):
        if file.exists():
            raise ConfigError(f"{file} exists already: name another file (opcd init FILE)")
        model = model or _ask("--model", "Model (folder or hub name)")
        context = context or Path(_ask("--context", "Context (text file that only the teacher sees)"))
        train = train or Path(_ask("--train", "Prompts to train on (JSON lines)"))
        held_out = (
            held_out if held_out is not None else _ask("--eval", "Held-out prompts with answers (empty: none)", "")
        )
        from deploy.starter.start import fitting_start, start_text

        here = _is_here(model)
        start = fitting_start(
            file=file,
            model=model,
            context=context,
            train=train,
            held_out=Path(held_out) if held_out else None,
            gpus=_count_gpus() if gpus is None else gpus,
            here=here,
        )
        file.write_text(start_text(start), encoding="utf-8")
        load_config(file)
    if not here:
        typer.echo(f"note: {model} is not on this machine: lengths and chat template are not checked yet", err=True)
    typer.echo(f"written to {file}; check the lines marked with <-, then: opcd train {file} --dry-run")


def _ask(option: str, question: str, default: str | None = None) -> str:
    """Ask on a terminal. Raises ConfigError, which names the option, elsewhere; a default answers there."""
    if _on_a_terminal():
        return str(typer.prompt(question, default=default, show_default=False))
    if default is None:
        raise ConfigError(f"{option} is missing: give it, or start opcd init on a terminal, which asks")
    return default


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


def _is_here(model: str) -> bool:
    """True if the model is on this machine. Raises ConfigError for a path without a model."""
    from common.data.model_lookup import is_cached, looks_like_path, require_model

    if looks_like_path(model):
        require_model(model)
    return Path(model).is_dir() or is_cached(model)


def _count_gpus() -> int:
    from common.sizing.machine import cuda_devices

    return len(cuda_devices())
