"""Permissions of written files, and the place of missing ones."""

from __future__ import annotations

import stat
from pathlib import Path


def seen_from(path: Path) -> str:
    """Name the folder that a relative path was searched in, for the error of a missing file."""
    return "" if path.is_absolute() else f" (seen from {Path.cwd()})"


def apply_umask(folder: Path) -> None:
    """Give all files below `folder`, which ``mkdir`` made, the permissions that the umask gives a new file.

    safetensors makes files that only their owner can read; whoever serves a model may be another user.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # mkdir applied the umask, which os.umask reads only by setting
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
