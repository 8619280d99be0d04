"""Client of Ray's job server: submit, follow, list and stop jobs, and count a cluster's GPUs. Imports ray."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state.api import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException
from tenacity import retry, retry_if_exception, stop_after_delay, wait_fixed

from common.config.model import Config, ConfigError
from deploy.submit.submit import EXCLUDES, Job
from learner.cluster.placement import PlacementError, bundles_of, impossible, shortfall


class ClusterError(RuntimeError):
    """Ray's job server was not reached or refused the request; the text is Ray's."""


KNOWN_ERRORS = (ClusterError, ConfigError, PlacementError, OSError)
"""Errors with a text for the user, printed without a traceback."""

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
INTERRUPTED = 130
QUIET = logging.getLogger("opcd.submit")
"""Logger for Ray's packer, whose default logger lists the files that it leaves out."""
HEAD_START_S = 60
NO_AGENT = "No available agent"
"""Start of the job server's refusal while no node has an agent that starts jobs."""


class Cluster:
    """A connection to the job server at `address` (``http://HEAD:8265``).

    Every request carries the token of `token_file`; None leaves Ray's own settings (``RAY_AUTH_MODE``,
    ``~/.ray/auth_token``). The constructor raises ConfigError, every method ClusterError.
    """

    def __init__(self, address: str, token_file: Path | None = None) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"--address {address}: expected the address of Ray's dashboard, http://HEAD:8265")
        for name in ADDRESS_VARIABLES:
            if os.environ.get(name, address) != address:
                # Ray's client silently prefers the variable.
                raise ConfigError(
                    f"{name} is {os.environ[name]}, and Ray would use it in place of --address {address}: unset {name}"
                )
        self.address = address
        self._headers = {} if token_file is None else {"Authorization": f"Bearer {read_token(token_file)}"}
        with ray_errors():
            self._jobs = JobSubmissionClient(address, headers=dict(self._headers))

    def gpus(self) -> dict[str, float]:
        """Return the number of GPUs, free or in use, of each living node."""
        headers = {"Content-Type": "application/json", **self._headers}
        options = ListApiOptions(limit=10_000, detail=False)
        with ray_errors():
            nodes = StateApiClient(self.address, headers=headers).list(StateResource.NODES, options, True)
        return gpus_of(nodes)

    def check(self, config: Config) -> None:
        """Raise PlacementError if the run does not fit on the idle cluster.

        A run that waits for new nodes (``run.placement_timeout_s``) is refused only if no cluster could hold it.
        """
        bundles = bundles_of(config)
        reason = impossible(bundles)
        if reason is None and bundles and not config.run.placement_timeout_s:
            reason = shortfall(bundles, self.gpus())
        if reason is not None:
            raise PlacementError(f"the cluster at {self.address}, if it were free: {reason}")

    def submit(self, job: Job) -> str:
        """Upload the files of `job`, start it and return its id. Retries for a minute while the head node starts."""
        try:
            with ray_errors():
                return self._submit(job)
        except ClusterError as error:
            if NO_AGENT not in str(error):
                raise
            raise ClusterError(
                f"{self.address} has had no agent to start jobs for {HEAD_START_S} s: another Ray on the head's "
                "machine may hold the agent's port (52365); start the head with another one: ray start --head "
                "--dashboard-agent-listen-port PORT"
            ) from error

    @retry(
        retry=retry_if_exception(lambda error: NO_AGENT in str(error)),
        stop=stop_after_delay(HEAD_START_S),
        wait=wait_fixed(1),
        reraise=True,
    )
    def _submit(self, job: Job) -> str:
        return self._jobs.submit_job(
            entrypoint=shlex.join(job.entrypoint),
            submission_id=job.submission_id,
            runtime_env={"working_dir": str(job.working_dir), **job.runtime_env},
            metadata=dict(job.metadata),
        )

    def follow(self, job_id: str, write: Callable[[str], object]) -> int:
        """Pass the job's output to `write` until it ends; return its exit status. Ctrl-C does not stop the job."""

        async def tail() -> None:
            async for lines in self._jobs.tail_job_logs(job_id):
                write(lines)

        try:
            with ray_errors():
                asyncio.run(tail())
                details = self._jobs.get_job_info(job_id)
                while not details.status.is_terminal():  # the output ends shortly before the status changes
                    time.sleep(0.2)
                    details = self._jobs.get_job_info(job_id)
        except KeyboardInterrupt:
            return INTERRUPTED
        return exit_status(details)

    def logs(self, job_id: str) -> str:
        """Return the output of the job so far."""
        with ray_errors():
            return self._jobs.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask the job to stop cleanly; return True if it was running."""
        with ray_errors():
            return self._jobs.stop_job(job_id)

    def jobs(self) -> list[JobDetails]:
        """Return the jobs that opcd submitted, from any machine, newest first."""
        with ray_errors():
            jobs = self._jobs.list_jobs()
        submitted = [job for job in jobs if "opcd_run" in (job.metadata or {})]
        return sorted(submitted, key=lambda job: -(job.start_time or 0))


@contextmanager
def ray_errors() -> Iterator[None]:
    """Turn errors of Ray's client into ClusterError. It raises RuntimeError for refusals, and OSError from requests."""
    try:
        yield
    except (AuthenticationError, OSError, RayStateApiException, RuntimeError) as error:
        raise ClusterError(" ".join(str(error).split())) from error


def gpus_of(nodes: list[dict[str, object]]) -> dict[str, float]:
    """Return the GPU counts of living nodes with GPUs by ``ADDRESS#NODE``, from Ray's list of nodes."""
    found: dict[str, float] = {}
    for node in nodes:
        resources = node["resources_total"]
        assert isinstance(resources, Mapping)
        if node["state"] == "ALIVE" and resources.get("GPU"):
            found[f"{node['node_ip']}#{str(node['node_id'])[:6]}"] = float(resources["GPU"])
    return found


def exit_status(job: JobDetails) -> int:
    """Return the status of the job's command; 130 for a stopped job, 1 for a job that Ray could not run."""
    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code or 1


def read_token(path: Path) -> str:
    """Read the token from a file. Raises ConfigError, whose text does not repeat the token."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: {type(error).__name__}") from None
    if not token or len(token.split()) != 1:
        raise ConfigError(f"--token-file {path}: expected one word")
    return token


def shipped_files(folder: Path) -> frozenset[Path]:
    """Return the absolute paths of the files in `folder` that Ray uploads, as Ray's own packer selects them."""
    root = folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "upload.zip"
        excludes = [*get_runtime_env_default_excludes(), *EXCLUDES]
        create_package(str(root), package, include_gitignore=True, excludes=excludes, logger=QUIET)
        with zipfile.ZipFile(package) as archive:
            return frozenset(root / name for name in archive.namelist())
