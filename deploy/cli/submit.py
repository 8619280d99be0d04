"""``opcd submit`` and ``opcd jobs``: runs on a Ray cluster that is reached by its address alone."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.config.loader import load_config
from common.config.model import ConfigError
from deploy.cli.errors import known_errors
from deploy.submit.files import file_faults
from deploy.submit.submit import plan, ray_command
from deploy.submit.wheel import wheels_folder, write_wheel

if TYPE_CHECKING:
    from deploy.submit.cluster import Cluster

Address = Annotated[str, typer.Option("--address", help="Ray's dashboard on the head, http://HEAD:8265.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", help="File with the cluster's token; default: what Ray finds by itself (RAY_AUTH_MODE=token)."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The id that `opcd submit` printed.")]

jobs = typer.Typer(help="Runs that were submitted to a Ray cluster.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(submit)
    app.add_typer(jobs, name="jobs")


def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file in the working directory.")],
    address: Address,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as learner.lr=1e-5.")
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="The folder to upload; relative paths of the run start there.", file_okay=False)
    ] = Path(),
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=NODE_NAME]", help="Environment variable that the nodes have; its value is never sent."
        ),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Environment variable to send; anyone may see it.")
    ] = None,
    token_file: TokenFile = None,
    job_id: Annotated[str | None, typer.Option("--id", help="Name of the job; default: made from run.name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume although model, teacher, data, context or loss changed.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show the output; end with the run's exit status.")] = False,
    check_gpus: Annotated[
        bool, typer.Option("--check-gpus/--no-check-gpus", help="Refuse a run that the cluster could not hold.")
    ] = True,
    show: Annotated[
        bool, typer.Option("--print", help="Print the `ray job submit` that does the same; send nothing.")
    ] = False,
) -> None:
    """Run a configuration on a Ray cluster. Prints the job's id.

    The working directory is uploaded without models, runs, keys and what .gitignore names, opcd itself as a wheel:
    the nodes need its dependencies, not opcd.
    """
    from deploy.submit.cluster import KNOWN_ERRORS, shipped_files

    with known_errors(*KNOWN_ERRORS):
        resolved = load_config(config, overrides or ())
        shipped = shipped_files(working_dir)
        faults = file_faults(resolved, working_dir, lambda path: is_shipped(path, shipped))
        if Path(config).resolve() not in shipped:
            faults.append(f"{config} is not uploaded with {working_dir.resolve()}: --working-dir names the folder")
        if token_file is not None and token_file.resolve() in shipped:
            faults.append(
                f"--token-file {token_file} would be uploaded with {working_dir.resolve()}, for whoever may read the "
                "job: keep it elsewhere, for example in ~/.ray/auth_token"
            )
        if faults:
            raise ConfigError("\n".join(faults))
        job = plan(
            config=Path(config),
            overrides=overrides or (),
            run_name=resolved.run.name,
            working_dir=working_dir,
            wheel=write_wheel(wheels_folder()),
            submission_id=job_id or f"{resolved.run.name}-{secrets.token_hex(3)}",
            secrets=secret or (),
            variables=env or (),
            resume=resume,
            accept_changes=accept_changes,
        )
        if show:
            typer.echo(ray_command(job, address, token_file=token_file, follow=follow))
            return
        cluster = connect(address, token_file)
        if check_gpus:
            cluster.check(resolved)
        submitted = cluster.submit(job)
        typer.echo(submitted)
        status = _follow(cluster, submitted) if follow else 0
    raise typer.Exit(status)


@jobs.command("list")
def list_jobs(address: Address, token_file: TokenFile = None) -> None:
    """Submitted runs, the newest first."""
    from rich.console import Console
    from rich.table import Table

    from deploy.submit.cluster import KNOWN_ERRORS

    table = Table("job", "run", "status", "started", "minutes", box=None)
    with known_errors(*KNOWN_ERRORS):
        for job in connect(address, token_file).jobs():
            start_s, end_s = (job.start_time or 0) / 1000, (job.end_time or time.time() * 1000) / 1000
            started = time.strftime("%Y-%m-%d %H:%M", time.localtime(start_s))
            metadata = job.metadata or {}
            minutes = f"{(end_s - start_s) / 60:.1f}"
            table.add_row(job.submission_id, metadata["opcd_run"], job.status.value, started, minutes)
    Console().print(table)


@jobs.command()
def logs(
    job: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Until the run ends, with its exit status.")] = False,
    token_file: TokenFile = None,
) -> None:
    """What a submitted run has printed."""
    from deploy.submit.cluster import KNOWN_ERRORS

    with known_errors(*KNOWN_ERRORS):
        cluster, status = connect(address, token_file), 0
        if follow:
            status = _follow(cluster, job)
        else:
            typer.echo(cluster.logs(job), nl=False)
    raise typer.Exit(status)


@jobs.command()
def stop(job: JobId, address: Address, token_file: TokenFile = None) -> None:
    """End a submitted run in order: its weights and summary are written."""
    from deploy.submit.cluster import KNOWN_ERRORS

    with known_errors(*KNOWN_ERRORS):
        running = connect(address, token_file).stop(job)
    typer.echo(f"{job}: {'stopping' if running else 'was not running'}")


def connect(address: str, token_file: Path | None) -> Cluster:
    """The cluster at `address`; raises what is in `submit_cluster.KNOWN_ERRORS`."""
    from deploy.submit.cluster import Cluster

    return Cluster(address, token_file)


def is_shipped(path: Path, shipped: frozenset[Path]) -> bool:
    """Whether the upload has `path`, a file or a folder with a file in it."""
    return path in shipped or any(path in file.parents for file in shipped)


def _follow(cluster: Cluster, job_id: str) -> int:
    status = cluster.follow(job_id, lambda text: typer.echo(text, nl=False))
    typer.echo(f"{job_id}: exit status {status}", err=True)
    return status
