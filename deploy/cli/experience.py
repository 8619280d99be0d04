"""``opcd experience``: contexts that a model writes for itself, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from common.config.model import Config, ConfigError
from deploy.cli.errors import known_errors
from deploy.cli.loading import load_run_config

app = typer.Typer(
    help="Let a model write down what it learns from solving problems, and distil those notes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file with a section experience.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as experience.seeds=2.")
]


@app.command()
def extract(config: ConfigPath, overrides: Overrides = None) -> None:
    """Solve the problems of data.train without their answers and write insights: extracted.jsonl."""
    _run(config, overrides, lambda stages, resolved: stages.extract(resolved))


@app.command()
def accumulate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build nested contexts from the insights, each within experience.max_context_tokens: pool.jsonl."""
    _run(config, overrides, lambda stages, resolved: stages.accumulate(resolved))


@app.command()
def select(config: ConfigPath, overrides: Overrides = None) -> None:
    """Choose contexts from the pool, at random or by accuracy on data.valid: selected.jsonl."""
    _run(config, overrides, lambda stages, resolved: stages.select(resolved))


@app.command()
def consolidate(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")] = False,
) -> None:
    """Distil the selected contexts: opcd train with context.pool."""
    _run(config, overrides, lambda stages, resolved: stages.consolidate(resolved, resume=resume, overwrite=overwrite))


@app.command()
def rounds(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("--rounds", min=1, help="Number of rounds, each in runs/NAME/round-N/.")] = 2,
) -> None:
    """Run all four stages several times: the student of a round makes the experience of the next."""
    _run(config, overrides, lambda stages, resolved: stages.rounds(resolved, count))


def _run(config: str, overrides: list[str] | None, stage: Callable[[Any, Config], int]) -> None:
    """Load the configuration, then the module with the stages, which imports Ray, and end with the stage's status."""
    with known_errors(ConfigError):
        resolved = load_run_config(config, overrides)
    from learner.experience import commands

    with known_errors(*commands.KNOWN_ERRORS):
        raise typer.Exit(stage(commands, resolved))
