"""Finds the files that a configuration names and checks that a submitted job can read them. Sends nothing.

A job runs in a copy of the submitted folder. Relative paths count from the copy; absolute paths are on the cluster's
disks, which this machine cannot check. Results and secrets must not be in the copy: Ray deletes it after the job, and
everyone who can read the job can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from common.config.model import Config
from common.data.sources import is_file

Use = Literal["input", "output", "secret", "model"]

OUTPUTS = ("run.dir", "sync.folder")
SECRETS = ("client_key_file", "endpoint_key_file", "server_keys_file", "tls_key")
"""Last parts of the configuration keys that name files with secrets."""


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A configuration key, its path and the job's use of that path."""

    key: str
    path: Path
    use: Use


def named_files(config: Config) -> Iterator[NamedFile]:
    """Yield every path of a configuration, in order; a model may also be a hub name."""
    for key, value in _leaves(config, ""):
        leaf = key.rpartition(".")[2]
        if isinstance(value, Path) and is_file(value):  # not a source of rows such as game:FrozenLake
            use: Use = "output" if key in OUTPUTS else "secret" if leaf in SECRETS else "input"
            yield NamedFile(key, value, use)
        elif leaf == "model" and isinstance(value, str):
            yield NamedFile(key, Path(value), "model")


def file_faults(config: Config, folder: Path, is_shipped: Callable[[Path], bool]) -> list[str]:
    """Return a line with a remedy for each path that a job from `folder` cannot read or must not contain.

    `is_shipped` tells if the upload contains a path below `folder`.
    """
    return [fault for file in named_files(config) if (fault := _fault(file, folder, is_shipped))]


def _fault(file: NamedFile, folder: Path, is_shipped: Callable[[Path], bool]) -> str | None:
    key, path = file.key, file.path
    if path.is_absolute():
        return None  # on the cluster's disks
    if file.use == "output":
        return (
            f"{key} is `{path}`: Ray deletes the job's folder after the job; give an absolute path that all nodes "
            f"share, for example {key}=/shared/{path}"
        )
    if file.use == "secret":
        return (
            f"{key} is `{path}`: secrets are not uploaded; put the file on the cluster's nodes and give its absolute "
            f"path, for example {key}=/run/secrets/{path.name}"
        )
    here = (folder / path).resolve()
    if file.use == "model" and not here.exists():
        return None  # a hub name
    if not here.is_relative_to(folder.resolve()):
        return f"{key} is `{path}`: outside the submitted folder {folder}; give an absolute path on the cluster"
    if not here.exists():
        return f"{key} is `{path}`: no such file in the submitted folder {folder}"
    if not is_shipped(here):
        return (
            f"{key} is `{path}`: left out of the upload (by .gitignore, .rayignore or as a folder of models, runs or "
            f"keys); give an absolute path on the cluster, for example {key}=/shared/{path}"
        )
    return None


def _leaves(section: BaseModel, prefix: str) -> Iterator[tuple[str, object]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for inner, each in value.items():
                if isinstance(each, BaseModel):
                    yield from _leaves(each, f"{prefix}{name}.{inner}.")
                else:
                    yield f"{prefix}{name}.{inner}", each
        elif isinstance(value, tuple | list):
            yield from ((f"{prefix}{name}", each) for each in value)
        elif value is not None:
            yield f"{prefix}{name}", value
