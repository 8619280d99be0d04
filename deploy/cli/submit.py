"""``opcd submit`` and ``opcd jobs``: runs on a Ray cluster, of which only the address is known here."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.config.loader import load_config
from common.config.model import ConfigError
from common.import_names import check_import_names
from deploy.cli.errors import known_errors
from deploy.submit.files import file_faults
from deploy.submit.submit import plan, ray_command
from deploy.submit.wheel import wheels_folder, write_wheel

if TYPE_CHECKING:
    from deploy.submit.cluster import Cluster

Address = Annotated[str, typer.Option("--address", help="Ray's dashboard on the head node, http://HEAD:8265.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", help="File with the cluster's token; default: Ray's own settings (RAY_AUTH_MODE=token)."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Job id that `opcd submit` printed.")]

jobs = typer.Typer(help="Runs that were submitted to a Ray cluster.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(submit)
    app.add_typer(jobs, name="jobs")


def submit(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file in the working directory.")],
    address: Address,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as learner.lr=1e-5.")
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder to upload; relative paths of the run start in it.", file_okay=False)
    ] = Path(),
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=NODE_NAME]", help="Environment variable that is set on the nodes; its value is not sent."
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Environment variable to send; anyone with access to the cluster can read it."
        ),
    ] = None,
    token_file: TokenFile = None,
    job_id: Annotated[str | None, typer.Option("--id", help="Job id; default: run.name and a random suffix.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Resume although model, teacher, data, context or loss changed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of the same name.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print the output and exit with the run's status.")] = False,
    check_gpus: Annotated[
        bool,
        typer.Option("--check-gpus/--no-check-gpus", help="Refuse a run that needs more GPUs than the cluster has."),
    ] = True,
    show: Annotated[
        bool, typer.Option("--print", help="Print the equivalent `ray job submit` and send nothing.")
    ] = False,
) -> None:
    """Run a configuration on a Ray cluster. Prints the job's id.

    Uploads the working directory, except models, runs, keys and files that .gitignore names, and opcd as a wheel: the
    nodes need opcd's dependencies, not opcd itself.
    """
    from deploy.submit.cluster import KNOWN_ERRORS, shipped_files

    with known_errors(*KNOWN_ERRORS):
        check_import_names(working_dir)
        resolved = load_config(config, overrides or ())
        shipped = shipped_files(working_dir)
        faults = file_faults(resolved, working_dir, lambda path: is_shipped(path, shipped))
        if Path(config).resolve() not in shipped:
            faults.append(
                f"{config} is not among the files that {working_dir.resolve()} uploads; --working-dir sets the folder"
            )
        if token_file is not None and token_file.resolve() in shipped:
            faults.append(
                f"--token-file {token_file} would be uploaded with {working_dir.resolve()}, readable by everyone who "
                "can read the job: keep it elsewhere, for example in ~/.ray/auth_token"
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
            overwrite=overwrite,
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
    """List submitted runs, newest first."""
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
    follow: Annotated[
        bool, typer.Option("--follow", help="Print until the run ends and exit with its status.")
    ] = False,
    token_file: TokenFile = None,
) -> None:
    """Print the output of a submitted run."""
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
    """Stop a submitted run cleanly: it writes its weights and summary first."""
    from deploy.submit.cluster import KNOWN_ERRORS

    with known_errors(*KNOWN_ERRORS):
        running = connect(address, token_file).stop(job)
    typer.echo(f"{job}: {'stopping' if running else 'was not running'}")


def connect(address: str, token_file: Path | None) -> Cluster:
    """Connect to the cluster at `address`. Raises one of `deploy.submit.cluster.KNOWN_ERRORS`."""
    from deploy.submit.cluster import Cluster

    return Cluster(address, token_file)


def is_shipped(path: Path, shipped: frozenset[Path]) -> bool:
    """Return True if the upload contains `path`: the file, or a file in that folder."""
    return path in shipped or any(path in file.parents for file in shipped)


def _follow(cluster: Cluster, job_id: str) -> int:
    status = cluster.follow(job_id, lambda text: typer.echo(text, nl=False))
    typer.echo(f"{job_id}: exit status {status}", err=True)
    return status
