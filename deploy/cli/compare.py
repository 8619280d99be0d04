"""``opcd compare``: on-policy distillation and its baselines on the same rows, steps and seeds."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from common.config.loader import load_config
from common.config.model import ConfigError
from common.import_names import use_folder
from common.telemetry.run_files import Progress
from deploy.cli.errors import known_errors


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see deploy/configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides for all runs, such as learner.steps=10.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas.")
    ] = "opcd,offpolicy,sequence,pg,in_context",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; each method runs with each seed.")] = "0,1,2",
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,VALUE", help="Setting to vary; each method runs with each value."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs of an earlier comparison with another configuration.")
    ] = False,
) -> None:
    """Train with every method and seed and write one table: runs/NAME-compare/compare.md, .json, .svg and .html.

    --vary loss.top_k=1,16,256 gives one row for each value; several --vary options give every combination.

    Runs start one after another. To continue after an interrupt, repeat the command: runs that finished under the same
    configuration are kept, and a run with a checkpoint resumes; runs of another configuration are refused without
    --overwrite. A run that fails becomes a line of the table.
    """
    from deploy.compare import compare as comparison
    from deploy.compare.plan import is_finished, plan, root_of

    chosen = _listed(methods)
    with known_errors(ConfigError):
        use_folder(Path.cwd())
        try:
            numbers = [int(seed) for seed in _listed(seeds)]
        except ValueError as error:
            raise ConfigError(f"--seeds {seeds!r}: expected whole numbers separated by commas") from error
        runs = plan(config, overrides or (), chosen, numbers, vary or ())
        root = root_of(load_config(config, overrides or ()))
    progress = Progress()
    words = ["opcd compare", config, *(overrides or ()), f"--methods {methods}", f"--seeds {seeds}"]
    words += [f"--vary {setting}" for setting in vary or ()]
    try:
        train = partial(comparison.train_in_process, overwrite=overwrite)
        table = comparison.compare(runs, chosen, root, " ".join(words), progress, train)
    except KeyboardInterrupt:
        progress.line("interrupted; repeat the command to continue")
        raise typer.Exit(130) from None
    finished = [run.config.run.path for run in runs if run.config is not None and is_finished(run)]
    progress.line("\n" + table.read_text(encoding="utf-8"))
    progress.line(f"written to {root}/: {_written(finished, root)}")
    raise typer.Exit(0 if len(finished) == len(runs) else 1)


def _written(finished: list[Path], root: Path) -> str:
    """List the written files. Writes compare.html first, from the finished runs, if there are any."""
    names = [name for name in ("compare.md", "compare.json", "compare.svg") if (root / name).exists()]
    if finished:
        from deploy.report.load_run import ReportError
        from deploy.report.writing import write_comparison

        try:
            names.append(write_comparison(finished, root / "compare.html").name)
        except (ReportError, OSError) as error:
            print(f"opcd: compare.html was not written: {error}", file=sys.stderr)
    return ", ".join(names)


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
