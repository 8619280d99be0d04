"""What of a configuration names files, and whether a submitted job would find them. Pure but for looking at files.

A job runs in a copy of the submitted folder. Relative paths are read from there, absolute ones on the cluster's own
disks, which this machine does not know. Results and secrets must not be in that copy: it is deleted after the job, and
whoever may read the job may read it.
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
SECRETS = ("client_key_file", "server_keys_file", "tls_key")
"""Last parts of the keys of files that hold secrets."""


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A configuration key, the path in it and what the job does with it."""

    key: str
    path: Path
    use: Use


def named_files(config: Config) -> Iterator[NamedFile]:
    """Every path of a configuration, in its order; models that may be hub names among them."""
    for key, value in _leaves(config, ""):
        leaf = key.rpartition(".")[2]
        if isinstance(value, Path) and is_file(value):  # not a source of rows such as game:FrozenLake
            use: Use = "output" if key in OUTPUTS else "secret" if leaf in SECRETS else "input"
            yield NamedFile(key, value, use)
        elif leaf == "model" and isinstance(value, str):
            yield NamedFile(key, Path(value), "model")


def file_faults(config: Config, folder: Path, is_shipped: Callable[[Path], bool]) -> list[str]:
    """What a job submitted from `folder` would not find, or should not be given; one line each, with the remedy.

    `is_shipped` says of a path below `folder` whether the upload has it.
    """
    return [fault for file in named_files(config) if (fault := _fault(file, folder, is_shipped))]


def _fault(file: NamedFile, folder: Path, is_shipped: Callable[[Path], bool]) -> str | None:
    key, path = file.key, file.path
    if path.is_absolute():
        return None  # on the cluster; not known here
    if file.use == "output":
        return (
            f"{key} is `{path}`: a job's folder is deleted after it; give an absolute path that all nodes share, for "
            f"example {key}=/shared/{path}"
        )
    if file.use == "secret":
        return (
            f"{key} is `{path}`: secrets are not uploaded; put the file on the cluster's nodes and give its absolute "
            f"path there, for example {key}=/run/secrets/{path.name}"
        )
    here = (folder / path).resolve()
    if file.use == "model" and not here.exists():
        return None  # a hub name
    if not here.is_relative_to(folder.resolve()):
        return f"{key} is `{path}`: outside of the submitted folder {folder}; give an absolute path on the cluster"
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
