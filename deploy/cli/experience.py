"""``opcd experience``: contexts that a model writes for itself, stage by stage."""

from __future__ import annotations

from typing import Annotated

import typer

from common.config.loader import load_config
from common.config.model import Config, ConfigError
from deploy.cli.errors import known_errors

app = typer.Typer(
    help="Let a model write down what it learned from solving problems, and distil that.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file with a section experience.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as experience.seeds=2.")
]


@app.command()
def extract(config: ConfigPath, overrides: Overrides = None) -> None:
    """Solve problems of data.train without their answers, and write down insights: extracted.jsonl."""
    resolved = _load(config, overrides)
    from learner.experience import commands as stages

    with known_errors(*stages.KNOWN_ERRORS):
        raise typer.Exit(stages.extract(resolved))


@app.command()
def accumulate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make nested contexts of the insights, each at most experience.max_context_tokens: pool.jsonl."""
    resolved = _load(config, overrides)
    from learner.experience import commands as stages

    with known_errors(*stages.KNOWN_ERRORS):
        raise typer.Exit(stages.accumulate(resolved))


@app.command()
def select(config: ConfigPath, overrides: Overrides = None) -> None:
    """Choose contexts of the pool, at random or by accuracy on data.valid: selected.jsonl."""
    resolved = _load(config, overrides)
    from learner.experience import commands as stages

    with known_errors(*stages.KNOWN_ERRORS):
        raise typer.Exit(stages.select(resolved))


@app.command()
def consolidate(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
) -> None:
    """Distil the selected contexts: opcd train with context.pool."""
    resolved = _load(config, overrides)
    from learner.experience import commands as stages

    with known_errors(*stages.KNOWN_ERRORS):
        raise typer.Exit(stages.consolidate(resolved, resume=resume))


@app.command()
def rounds(
    config: ConfigPath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("--rounds", min=1, help="How many, each in runs/NAME/round-N/.")] = 2,
) -> None:
    """All four stages, again and again: each round's student makes the next round's experience."""
    resolved = _load(config, overrides)
    from learner.experience import commands as stages

    with known_errors(*stages.KNOWN_ERRORS):
        raise typer.Exit(stages.rounds(resolved, count))


def _load(config: str, overrides: list[str] | None) -> Config:
    with known_errors(ConfigError):
        return load_config(config, overrides or ())
