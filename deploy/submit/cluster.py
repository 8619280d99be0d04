"""Ray's job server: submit, follow, list, stop, and what GPUs a cluster has. Imports ray."""

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
    """Ray's job server was not reached, or refused; its own words."""


KNOWN_ERRORS = (ClusterError, ConfigError, PlacementError, OSError)
"""Errors whose text is all a user needs."""

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
INTERRUPTED = 130
QUIET = logging.getLogger("opcd.submit")
"""For Ray's packer, whose own logger lists what it ignores."""
HEAD_START_S = 60


class Cluster:
    """A connection to the job server at `address` (``http://HEAD:8265``).

    With `token_file` every request carries the token in it; without, Ray's own settings (``RAY_AUTH_MODE``,
    ``~/.ray/auth_token``) hold. Raises ConfigError, and every method ClusterError.
    """

    def __init__(self, address: str, token_file: Path | None = None) -> None:
        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"--address {address}: expected the address of Ray's dashboard, http://HEAD:8265")
        for name in ADDRESS_VARIABLES:
            if os.environ.get(name, address) != address:
                # Ray's client lets the variable win, in silence.
                raise ConfigError(f"{name} is {os.environ[name]}, and Ray would take it for --address {address}: unset")
        self.address = address
        self._headers = {} if token_file is None else {"Authorization": f"Bearer {read_token(token_file)}"}
        with rays_errors():
            self._jobs = JobSubmissionClient(address, headers=dict(self._headers))

    def gpus(self) -> dict[str, float]:
        """GPUs of each living node, used ones included, by the node's address."""
        headers = {"Content-Type": "application/json", **self._headers}
        options = ListApiOptions(limit=10_000, detail=False)
        with rays_errors():
            nodes = StateApiClient(self.address, headers=headers).list(StateResource.NODES, options, True)
        return gpus_of(nodes)

    def check(self, config: Config) -> None:
        """Whether the run fits on the cluster with nothing else on it. Raises PlacementError with what is missing. Of a
        run that waits for nodes to come (``run.placement_timeout_s``) only what no cluster can hold is refused.
        """
        bundles = bundles_of(config)
        why = impossible(bundles)
        if why is None and bundles and not config.run.placement_timeout_s:
            why = shortfall(bundles, self.gpus())
        if why is not None:
            raise PlacementError(f"the cluster at {self.address}, if it were free: {why}")

    def submit(self, job: Job) -> str:
        """Upload what `job` needs and start it; returns its id. A head that has just started is waited for."""
        with rays_errors():
            return self._submit(job)

    @retry(
        retry=retry_if_exception(lambda error: "No available agent" in str(error)),
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
        """Hand the job's output to `write` until it ends; returns its exit status. Ctrl-C leaves the job alone."""

        async def tail() -> None:
            async for lines in self._jobs.tail_job_logs(job_id):
                write(lines)

        try:
            with rays_errors():
                asyncio.run(tail())
                details = self._jobs.get_job_info(job_id)
                while not details.status.is_terminal():  # the output ends a moment before the state is written
                    time.sleep(0.2)
                    details = self._jobs.get_job_info(job_id)
        except KeyboardInterrupt:
            return INTERRUPTED
        return exit_status(details)

    def logs(self, job_id: str) -> str:
        """All that the job has printed so far."""
        with rays_errors():
            return self._jobs.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask the job to end in order; whether it was running."""
        with rays_errors():
            return self._jobs.stop_job(job_id)

    def jobs(self) -> list[JobDetails]:
        """The jobs that `submit` sent, from whatever machine, the newest first."""
        with rays_errors():
            known = self._jobs.list_jobs()
        sent = [job for job in known if "opcd_run" in (job.metadata or {})]
        return sorted(sent, key=lambda job: -(job.start_time or 0))


@contextmanager
def rays_errors() -> Iterator[None]:
    """Ray's client raises RuntimeError for whatever the server answers, and what `requests` raises, which is OSError;
    here they get a name."""
    try:
        yield
    except (AuthenticationError, OSError, RayStateApiException, RuntimeError) as error:
        raise ClusterError(" ".join(str(error).split())) from error


def gpus_of(nodes: list[dict[str, object]]) -> dict[str, float]:
    """GPUs by ``ADDRESS#NODE`` of the living nodes that have any, from Ray's list of nodes."""
    found: dict[str, float] = {}
    for node in nodes:
        resources = node["resources_total"]
        assert isinstance(resources, Mapping)
        if node["state"] == "ALIVE" and resources.get("GPU"):
            found[f"{node['node_ip']}#{str(node['node_id'])[:6]}"] = float(resources["GPU"])
    return found


def exit_status(job: JobDetails) -> int:
    """That of the job's command; 130 for a job that was stopped, 1 for one that Ray could not run."""
    if job.status == JobStatus.STOPPED:
        return INTERRUPTED
    if job.status == JobStatus.SUCCEEDED:
        return 0
    return job.driver_exit_code or 1


def read_token(path: Path) -> str:
    """The token in a file. Raises ConfigError, without the token."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: {type(error).__name__}") from None
    if not token or len(token.split()) != 1:
        raise ConfigError(f"--token-file {path}: expected one word")
    return token


def shipped_files(folder: Path) -> frozenset[Path]:
    """What of `folder` Ray uploads, found out by its own packer: absolute paths of files."""
    root = folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "upload.zip"
        excludes = [*get_runtime_env_default_excludes(), *EXCLUDES]
        create_package(str(root), package, include_gitignore=True, excludes=excludes, logger=QUIET)
        with zipfile.ZipFile(package) as archive:
            return frozenset(root / name for name in archive.namelist())
