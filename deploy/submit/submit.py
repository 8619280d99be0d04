"""Describes a run as a Ray job, and prints the equivalent ``ray job submit``. Sends nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.model import ConfigError

EXCLUDES = (
    "/.git",
    "/.venv",
    "/venv",
    "/runs",
    "/models",
    "/keys",
    "/site",
    "/build",
    "/dist",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
    "*.key",
    "*.pem",
    ".env",
)
"""Never uploaded, in the syntax of .gitignore. The folder's .gitignore and .rayignore exclude further files."""

STOP_WAIT_S = 600
"""Time for a stopped job to end cleanly. Ray's default of 3 seconds is too short to save a model."""

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Variable names that Ray substitutes; it leaves other ``${...}`` unchanged."""
LIKE_A_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Job:
    """A request to Ray's job server."""

    submission_id: str
    entrypoint: tuple[str, ...]
    """The command, run in a copy of the working directory."""
    working_dir: Path
    runtime_env: dict[str, Any]
    """Without the working directory, for which ``ray job submit`` has a separate option."""
    metadata: dict[str, str]


def plan(
    *,
    config: Path,
    overrides: Sequence[str],
    run_name: str,
    working_dir: Path,
    wheel: Path,
    submission_id: str,
    secrets: Sequence[str] = (),
    variables: Sequence[str] = (),
    resume: bool = False,
    accept_changes: bool = False,
    overwrite: bool = False,
) -> Job:
    """Return the job that runs `config`, a file below `working_dir`, with the code in `wheel`.

    `secrets` name environment variables of the cluster's nodes (``NAME``, or ``NAME=NODE_NAME``): the job record holds
    the names, and each node substitutes its values. `variables` (``NAME=VALUE``) are sent with their values.

    Raises ConfigError for a file outside the folder, a bad name, or a secret among `variables`.
    """
    if not SUBMISSION_ID.fullmatch(submission_id):
        raise ConfigError(f"--id {submission_id!r}: letters, digits, dots, dashes and underscores")
    given = {"--resume": resume, "--accept-changes": accept_changes, "--overwrite": overwrite}
    flags = [flag for flag, value in given.items() if value]
    inside = below(config, working_dir).as_posix()
    return Job(
        submission_id=submission_id,
        entrypoint=("python", "-m", "learner.train", inside, *overrides, *flags),
        working_dir=working_dir.resolve(),
        runtime_env={
            "excludes": list(EXCLUDES),
            "py_modules": [str(wheel)],
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                **dict(map(plain_variable, variables)),
                **dict(map(secret_variable, secrets)),
            },
        },
        metadata={"opcd_run": run_name, "opcd_config": inside},
    )


def below(path: Path, folder: Path) -> Path:
    """Return `path` relative to `folder`. Raises ConfigError if the folder does not contain it."""
    absolute, root = path.resolve(), folder.resolve()
    if not absolute.is_relative_to(root):
        raise ConfigError(f"{path} is not in {root}, the folder that is uploaded; --working-dir names another")
    return absolute.relative_to(root)


def secret_variable(text: str) -> tuple[str, str]:
    """Parse ``NAME`` or ``NAME=NODE_NAME`` into a pair for ``env_vars``; Ray substitutes the node's value."""
    name, equals, node_name = text.partition("=")
    node_name = node_name if equals else name
    if not VARIABLE.fullmatch(name) or not VARIABLE.fullmatch(node_name):
        # The message does not repeat the text, which may be the secret itself.
        raise ConfigError(
            "--secret: expected NAME or NAME=NODE_NAME, names of environment variables on the cluster's nodes "
            "(capitals, digits and underscores), never a value"
        )
    return name, f"${{{node_name}}}"


def plain_variable(text: str) -> tuple[str, str]:
    """Parse ``NAME=VALUE``. Raises ConfigError for a name like a secret's, because the job record shows the value."""
    name, equals, value = text.partition("=")
    if not equals or not VARIABLE.fullmatch(name):
        raise ConfigError(f"--env {name}: expected NAME=VALUE; capitals, digits and underscores in the name")
    if LIKE_A_SECRET.search(name):
        raise ConfigError(
            f"--env {name}: looks like a secret, and everyone who can read the job can read its variables; set it on "
            f"the cluster's nodes and pass its name: --secret {name}"
        )
    return name, value


def ray_command(job: Job, address: str, *, token_file: Path | None = None, follow: bool = False) -> str:
    """Return the ``ray job submit`` command that sends `job`, for a POSIX shell."""
    login = [] if token_file is None else ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={shlex.quote(str(token_file))}"]
    options = {
        "--address": address,
        "--submission-id": job.submission_id,
        "--working-dir": str(job.working_dir),
        "--runtime-env-json": json.dumps(job.runtime_env),
        "--metadata-json": json.dumps(job.metadata),
    }
    words = ["ray", "job", "submit", *(word for pair in options.items() for word in pair)]
    words += [*([] if follow else ["--no-wait"]), "--", *job.entrypoint]
    return " ".join([*login, shlex.join(words)])
