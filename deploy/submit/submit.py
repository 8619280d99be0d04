"""A run as a Ray job: what is sent, and the plain ``ray job submit`` that would send the same. Pure.

Contacting a cluster is `deploy.submit.cluster`, the wheel `deploy.submit.wheel`, the files of a configuration
`deploy.submit.files`.
"""

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
"""Never uploaded, in the syntax of .gitignore; beside them what .gitignore and .rayignore of the folder name."""

STOP_WAIT_S = 600
"""How long a stopped job has to end in order. Ray's own 3 seconds are too short to save a model."""

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Names that Ray fills in (others it leaves as they stand)."""
LIKE_A_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Job:
    """What Ray's job server is asked to run."""

    submission_id: str
    entrypoint: tuple[str, ...]
    """Words of the command, run in a copy of the working directory."""
    working_dir: Path
    runtime_env: dict[str, Any]
    """Without the working directory, which ``ray job submit`` takes as an option of its own."""
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
) -> Job:
    """The job that runs `config`, a file below `working_dir`, with the code in `wheel`.

    `secrets` are names of environment variables (``NAME``, or ``NAME=NODE_NAME``) that the cluster's nodes have:
    the job record holds the names, each node fills in the values. `variables` (``NAME=VALUE``) are sent as they are.

    Raises ConfigError for a file outside of the folder, a bad name, and a secret among `variables`.
    """
    if not SUBMISSION_ID.fullmatch(submission_id):
        raise ConfigError(f"--id {submission_id!r}: letters, digits, dots, dashes and underscores")
    flags = [*(["--resume"] if resume else []), *(["--accept-changes"] if accept_changes else [])]
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
    """`path` seen from `folder`, which must hold it: the job knows nothing else. Raises ConfigError."""
    here, root = path.resolve(), folder.resolve()
    if not here.is_relative_to(root):
        raise ConfigError(f"{path} is not in {root}, the folder that is uploaded; --working-dir names another")
    return here.relative_to(root)


def secret_variable(text: str) -> tuple[str, str]:
    """``NAME`` or ``NAME=NODE_NAME`` as the pair for ``env_vars``, in which Ray fills in the node's own value."""
    name, equals, node_name = text.partition("=")
    node_name = node_name if equals else name
    if not VARIABLE.fullmatch(name) or not VARIABLE.fullmatch(node_name):
        # The text is not repeated: what stands there may be the secret itself.
        raise ConfigError(
            "--secret: expected NAME, or NAME=NODE_NAME, of environment variables that the cluster's nodes have; "
            "capitals, digits and underscores. Values do not belong there"
        )
    return name, f"${{{node_name}}}"


def plain_variable(text: str) -> tuple[str, str]:
    """``NAME=VALUE`` as a pair; a name that looks like a secret's is refused, because everybody sees the value."""
    name, equals, value = text.partition("=")
    if not equals or not VARIABLE.fullmatch(name):
        raise ConfigError(f"--env {name}: expected NAME=VALUE; capitals, digits and underscores in the name")
    if LIKE_A_SECRET.search(name):
        raise ConfigError(
            f"--env {name}: looks like a secret, and whoever may read the job reads its variables; set it on the "
            f"cluster's nodes and name it: --secret {name}"
        )
    return name, value


def ray_command(job: Job, address: str, *, token_file: Path | None = None, follow: bool = False) -> str:
    """The ``ray job submit`` that sends `job`, for a POSIX shell."""
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
