"""The ``opcd`` program. Commands import heavy packages inside their functions, so that ``opcd --help`` is fast."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common.config.loader import dump_config, load_teacher_config
from common.config.model import ConfigError
from common.protocol.scoring import TeacherError
from common.telemetry.library_messages import hide_expected_warnings
from common.telemetry.run_folder import check_free, nothing_to_resume
from deploy.cli import compare, experience, init, report, serve, submit, version
from deploy.cli.errors import known_errors
from deploy.cli.loading import load_run_config
from deploy.tasks.gguf import Dtype

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


class Task(StrEnum):
    """Arguments of `opcd prepare`."""

    SMOLLM2 = "smollm2"
    HIDDEN_RULE = "hidden-rule"
    EXPERIENCE_RULE = "experience-rule"
    FROZEN_LAKE = "frozen-lake"
    FEW_SHOT = "few-shot"
    CODE_STYLE = "code-style"
    GGUF = "gguf"


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything that needs no service, print a summary, start nothing.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete configuration; start nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume although model, teacher, data, context or loss changed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print times, queues and parity of each step, too.")
    ] = False,
) -> None:
    """Distil a context into a student: a whole run."""
    with known_errors(ConfigError):
        resolved = load_run_config(config, overrides)
        check_free(resolved.run.path, resume=resume, overwrite=overwrite)
    if resume and (finished := nothing_to_resume(resolved.run.path, resolved.learner.steps)) is not None:
        typer.echo(finished)  # before anything heavy is imported
        return
    if print_config:
        typer.echo(dump_config(resolved), nl=False)
    if dry_run:
        from deploy.inspect.dry_run import summary_text
        from learner.preflight.checks import preflight
        from learner.preflight.report import summary as fact

        report = preflight(resolved, offline=True)
        for text in report.texts("warning"):
            typer.echo(f"warning: {text}", err=True)
        with known_errors(ConfigError):
            report.raise_errors()
        if resume:
            from learner.train import KNOWN_ERRORS, check_resume

            with known_errors(*KNOWN_ERRORS):
                plan = check_resume(resolved, report.inputs, accept_changes=accept_changes)
            report.findings.append(fact("resume", plan))
        for line in summary_text(report):
            typer.echo(line, err=print_config)
    if dry_run or print_config:
        return
    from learner import train as entry

    with known_errors(*entry.KNOWN_ERRORS):
        raise typer.Exit(
            entry.run(resolved, resume=resume, accept_changes=accept_changes, overwrite=overwrite, verbose=verbose)
        )


@app.command()
def teacher(config: ConfigPath, overrides: Overrides = None) -> None:
    """Serve the teacher of a configuration until Ctrl-C or SIGTERM."""
    with known_errors(ConfigError):
        resolved = load_teacher_config(config, overrides or ())
    from teacher_server.http.serve import serve

    with known_errors(ConfigError, TeacherError):
        serve(resolved.teacher)


@app.command()
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Model folder to evaluate; default: the student's initial model.", file_okay=False),
    ] = None,
) -> None:
    """Measure held-out accuracy without and with the context."""
    with known_errors(ConfigError):
        resolved = load_run_config(config, overrides)
        if checkpoint is not None and not (checkpoint / "config.json").is_file():
            raise ConfigError(f"--checkpoint {checkpoint}: not a model folder (no config.json)")
    from learner import train as entry

    with known_errors(*entry.KNOWN_ERRORS):
        raise typer.Exit(entry.evaluate(resolved, checkpoint))


@app.command()
def simulate(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="A run's YAML file (with --from; default: that of the measured run), or a file with a section "
            "simulation.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Overrides such as simulation.sync.seconds=2, or keys of the run."),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option("--from", help="Finished run (runs/NAME) to take the measured times from.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of rollout workers, each as fast as the measured one.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="Number of learner ranks.")] = None,
    teachers: Annotated[int | None, typer.Option(help="Number of teacher servers.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="File to write the simulated timeline to; ui.perfetto.dev opens it.")
    ] = None,
) -> None:
    """Predict step time, idle time and queues of a run on machines that you do not have.

    Applies the loop's own rules to stages that only take time. Not modelled: oversampled prompts
    (rollout.oversample_fraction), ranks that wait for each other in every micro-batch (ZeRO 2 and 3), samples under
    several contexts, processes that share cores differently than in the measured run, evaluation, checkpoints.
    """
    from common.telemetry.trace import TraceFile
    from deploy.simulator.file import load_simulation
    from deploy.simulator.report import summary
    from deploy.simulator.simulate import simulate as run_simulation

    if config is not None and "=" in config:
        overrides, config = [config, *(overrides or ())], None
    sizes = {"rollout.workers": workers, "learner.ranks": ranks, "teacher.replicas": teachers}
    size_overrides = [f"simulation.{key}={value}" for key, value in sizes.items() if value is not None]
    with known_errors(ConfigError, OSError):
        if config is None and measured is None:
            raise ConfigError("simulate needs a file with the section `simulation:`, or a run (--from)")
        found = load_simulation(config or f"{measured}/config.yaml", [*(overrides or ()), *size_overrides], measured)
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
    task: Annotated[Task, typer.Argument(metavar="TASK", help="Name of the model or task.")],
    file: Annotated[Path | None, typer.Argument(help="The file that `gguf` converts.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: models/TASK.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights that `gguf` writes.")] = "bfloat16",
) -> None:
    """Write the model and the rows of a small task into a folder, once. Downloads nothing.

    smollm2: a language model, from packaged weights. few-shot: rows of three tasks for it. code-style: rows for a
    larger model that writes Python. hidden-rule: a larger and a smaller model of a toy task. experience-rule: a model
    that writes down what it learns. frozen-lake: a model that plays the game by its context. The last three are
    trained here, in minutes. gguf: your own model, from a GGUF file.
    """
    from deploy.tasks.folders import PrepareError

    folder = out or Path("models") / (file.stem if file else task.value)
    with known_errors(PrepareError, OSError):
        if (file is None) == (task is Task.GGUF):
            raise PrepareError("`opcd prepare gguf FILE` converts a file; no other task takes one")
        written = _prepare(task, folder, file, dtype)
    typer.echo(f"{folder}: {'written' if written else 'exists already'}")


def _prepare(task: Task, folder: Path, file: Path | None, dtype: Dtype) -> bool:
    match task:
        case Task.GGUF:
            from deploy.tasks.gguf import prepare_gguf

            assert file is not None
            return prepare_gguf(file, folder, dtype)
        case Task.SMOLLM2:
            from deploy.tasks.gguf import prepare_smollm2

            return prepare_smollm2(folder)
        case Task.HIDDEN_RULE:
            from deploy.tasks.hidden_rule import prepare_hidden_rule

            return prepare_hidden_rule(folder)
        case Task.EXPERIENCE_RULE:
            from deploy.tasks.experience_rule import prepare_experience_rule

            return prepare_experience_rule(folder)
        case Task.FROZEN_LAKE:
            from deploy.tasks.frozen_lake import prepare_frozen_lake

            return prepare_frozen_lake(folder)
        case Task.FEW_SHOT:
            from deploy.tasks.few_shot import prepare_few_shot

            return prepare_few_shot(folder)
        case Task.CODE_STYLE:
            from deploy.tasks.code_style import prepare_code_style

            return prepare_code_style(folder)


@app.command()
def key(
    tenant: Annotated[str, typer.Argument(metavar="TEAM", help="Name of the team that uses the key.")],
    out: Annotated[
        Path | None,
        typer.Option(help="New file for the key (a run's teacher.client_key_file); default: print the key."),
    ] = None,
) -> None:
    """Make a key for a teacher server. Prints the line for its teacher.server_keys_file: opcd key TEAM >> keys."""
    from teacher_server.http.auth import new_key

    secret, digest = new_key()
    with known_errors(ConfigError, OSError):
        if not TENANT.fullmatch(tenant):
            raise ConfigError(f"tenant {tenant!r}: 1 to 64 letters, digits, dots, dashes and underscores")
        if out is not None:
            try:
                descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                raise ConfigError(
                    f"{out} exists already, and a key in use is never replaced: choose another --out"
                ) from None
            with open(descriptor, "w", encoding="ascii") as stream:
                stream.write(secret + "\n")
    typer.echo(f"{tenant} {digest}")
    typer.echo(f"the key, printed only once: {secret}" if out is None else f"the key is in {out}", err=True)


@app.command()
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="A run's YAML file: also compare its needs with the machine."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Report missing or broken requirements and the kinds of run that this machine supports.

    With a configuration also: memory and disk that each process of the run needs, against what the machine has.
    """
    from deploy.inspect.doctor import report

    status = report()
    if config is not None:
        from deploy.inspect.dry_run import summary_text
        from learner.preflight.needs import find_needs
        from learner.preflight.report import Report

        with known_errors(ConfigError):
            needs = Report(list(find_needs(load_run_config(config, overrides))))
            typer.echo("\n" + "\n".join(summary_text(needs)))
            for text in needs.texts("warning"):
                typer.echo(f"warning: {text}", err=True)
            needs.raise_errors()
    raise typer.Exit(status)


app.command()(init.init)
version.register(app)
submit.register(app)
app.add_typer(experience.app, name="experience")
report.register(app)
serve.register(app)
app.command()(compare.compare)


def main() -> None:
    """Run the ``opcd`` command line."""
    hide_expected_warnings()
    app()


if __name__ == "__main__":
    main()
