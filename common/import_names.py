"""Refuses a user's folder whose packages hide opcd's, and makes the other modules of the folder importable."""

from __future__ import annotations

import filecmp
import sys
from pathlib import Path

from common.config.model import ConfigError

PACKAGES = ("common", "deploy", "learner", "rollout_workers", "teacher_server")
ROOT = Path(__file__).parents[1]


def use_folder(folder: Path) -> None:
    """Let the driver import graders and environments from `folder`, after every installed package.

    Ray's workers import from the folder that a run starts in before anything else. Raises ConfigError for a folder
    that `check_import_names` refuses.
    """
    check_import_names(folder)
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def check_import_names(folder: Path) -> None:
    """Raise ConfigError if Python, with `folder` first on its path, would import an opcd package from `folder`.

    A copy of the running opcd passes: a clone with the same sources, after ``pip install .``.
    """
    for name in PACKAGES:
        if _hides(folder.resolve(), name):
            raise ConfigError(
                f"{folder.resolve()} holds a Python package or module `{name}`, which hides opcd's package of that "
                "name: rename it, or keep the run's files in a folder without it"
            )


def _hides(folder: Path, name: str) -> bool:
    package, own = folder / name, ROOT / name
    if (folder / f"{name}.py").is_file():
        return True
    if not package.is_dir() or package.samefile(own):
        return False
    if not (package / "__init__.py").is_file():
        # A namespace package: under an editable installation its entries come before opcd's modules of the same names.
        return any(_is_module(own, entry.stem) for entry in package.iterdir())
    return not all(_equal(package / path.relative_to(own), path) for path in own.rglob("*.py"))


def _is_module(package: Path, name: str) -> bool:
    return (package / f"{name}.py").is_file() or (package / name / "__init__.py").is_file()


def _equal(first: Path, second: Path) -> bool:
    return first.is_file() and filecmp.cmp(first, second, shallow=False)
