"""The ``opcd`` command line. Heavy imports happen inside the commands, so that ``opcd --help`` answers at once."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common.config.loader import dump_config, load_config, load_teacher_config
from common.config.model import ConfigError
from common.data.rows import DataError
from common.protocol.scoring import TeacherError
from deploy.cli import compare, experience, report, submit, version
from deploy.cli.errors import known_errors

app = typer.Typer(
    name="opcd",
    help="On-policy context distillation: vLLM rollouts, a shared teacher server, a DeepSpeed learner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, see deploy/configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides such as learner.lr=1e-5; null unsets a key."),
]

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Model(StrEnum):
    """Models and rows that `opcd prepare` knows."""

    SMOLLM2 = "smollm2"
    HIDDEN_RULE = "hidden-rule"
    EXPERIENCE_RULE = "experience-rule"
    FROZEN_LAKE = "frozen-lake"
    FEW_SHOT = "few-shot"


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration, check the data, start nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes", help="Resume although the model, teacher, data, context or loss is another one."
        ),
    ] = False,
) -> None:
    """Distil a context into a student: the whole run."""
    with known_errors(ConfigError, DataError):
        resolved = load_config(config, overrides or ())
        if dry_run:
            from deploy.inspect.checks import check_data

            checked = check_data(resolved)
            typer.echo(dump_config(resolved), nl=False)
            typer.echo(checked, err=True)
            return
    from learner import train as entry

    with known_errors(*entry.KNOWN_ERRORS):
        raise typer.Exit(entry.run(resolved, resume=resume, accept_changes=accept_changes))


@app.command()
def teacher(config: ConfigPath, overrides: Overrides = None) -> None:
    """Serve the teacher of a configuration until it is told to stop."""
    with known_errors(ConfigError):
        resolved = load_teacher_config(config, overrides or ())
    from teacher_server.http.serve import serve

    with known_errors(ConfigError, TeacherError):
        serve(resolved)


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A model folder to evaluate; default: the student's initial model.", file_okay=False),
    ] = None,
) -> None:
    """Held-out accuracy without and with the context."""
    with known_errors(ConfigError):
        resolved = load_config(config, overrides or ())
        if checkpoint is not None and not (checkpoint / "config.json").is_file():
            raise ConfigError(f"--checkpoint {checkpoint}: no model there (no config.json)")
    from learner import train as entry

    with known_errors(*entry.KNOWN_ERRORS):
        raise typer.Exit(entry.evaluate(resolved, checkpoint))


@app.command()
def simulate(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A run's YAML file (with --from), or one with a section simulation.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Overrides such as simulation.sync.seconds=2, or of the run's own keys."
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", help="A finished run (runs/NAME) that says how fast the parts are.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Rollout workers, each as fast as the measured one.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks of the learner.")] = None,
    teachers: Annotated[int | None, typer.Option(help="Teacher servers.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the simulated timeline there; ui.perfetto.dev opens it.")
    ] = None,
) -> None:
    """Predict step time, bubbles and queues of a run, on machines that need not be there.

    The loop's own rules over stages that only take time. Left out: over-issued prompts (rollout.oversample_fraction), ranks of
    ZeRO 2 and 3 waiting for each other in every micro-batch, samples under several contexts, processes that share
    cores in another way than in the measured run, evaluation and checkpoints.
    """
    from common.telemetry.trace import TraceFile
    from deploy.simulator.file import load_simulation
    from deploy.simulator.report import summary
    from deploy.simulator.simulate import simulate as run_simulation

    sizes = {"rollout.workers": workers, "learner.ranks": ranks, "teacher.replicas": teachers}
    asked = [f"simulation.{key}={value}" for key, value in sizes.items() if value is not None]
    with known_errors(ConfigError, OSError):
        found = load_simulation(config, [*(overrides or ()), *asked], measured)
        simulation = run_simulation(found.simulation)
        if trace is not None:
            trace.unlink(missing_ok=True)
            with TraceFile(trace) as file:
                file.write(simulation.spans)
    from rich.console import Console

    Console().print(summary(found.simulation, simulation))
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)


@app.command()
def prepare(
    model: Annotated[Model, typer.Argument(help="Which.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: models/MODEL.")] = None,
) -> None:
    """Write models or rows into a folder, once: smollm2, from packaged weights; few-shot, rows of three tasks for it;
    hidden-rule, a larger and a smaller model of a toy task with its rows, experience-rule, a model that can look back
    at what it did, with its rows, and frozen-lake, a model that plays that game by its context, all trained here in
    minutes. Installs and downloads nothing.
    """
    from deploy.tasks.gguf import PrepareError

    folder = out or Path("models") / model.value
    with known_errors(PrepareError):
        written = _prepare(model, folder)
    typer.echo(f"{folder}: {'written' if written else 'there already'}")


def _prepare(model: Model, folder: Path) -> bool:
    match model:
        case Model.SMOLLM2:
            from deploy.tasks.gguf import prepare_smollm2

            return prepare_smollm2(folder)
        case Model.HIDDEN_RULE:
            from deploy.tasks.hidden_rule import prepare_hidden_rule

            return prepare_hidden_rule(folder)
        case Model.EXPERIENCE_RULE:
            from deploy.tasks.experience_rule import prepare_experience_rule

            return prepare_experience_rule(folder)
        case Model.FROZEN_LAKE:
            from deploy.tasks.frozen_lake import prepare_frozen_lake

            return prepare_frozen_lake(folder)
        case Model.FEW_SHOT:
            from deploy.tasks.few_shot import prepare_few_shot

            return prepare_few_shot(folder)


@app.command()
def key(
    tenant: Annotated[str, typer.Argument(help="The team the key belongs to.")],
    out: Annotated[
        Path | None, typer.Option(help="New file for the key (teacher.client_key_file of a run); default: show it.")
    ] = None,
) -> None:
    """Make a key for a teacher server. Prints the line for its teacher.server_keys_file: opcd key TEAM >> keys."""
    from teacher_server.http.auth import new_key

    secret, digest = new_key()
    with known_errors(ConfigError, OSError):
        if not TENANT.fullmatch(tenant):
            raise ConfigError(f"tenant {tenant!r}: 1 to 64 letters, digits, dots, dashes and underscores")
        if out is not None:
            with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
                stream.write(secret + "\n")
    typer.echo(f"{tenant} {digest}")
    typer.echo(f"the key, shown this once: {secret}" if out is None else f"the key is in {out}", err=True)


@app.command()
def doctor() -> None:
    """Show what this machine can run, and what is missing or broken."""
    from deploy.inspect.doctor import report

    raise typer.Exit(report())


version.register(app)
submit.register(app)
app.add_typer(experience.app, name="experience")
report.register(app)
app.command()(compare.compare)


def main() -> None:
    """Entry of the ``opcd`` script."""
    app()


if __name__ == "__main__":
    main()
