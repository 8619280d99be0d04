"""Permissions of written files."""

from __future__ import annotations

import stat
from pathlib import Path


def apply_umask(folder: Path) -> None:
    """Give all files below `folder`, which ``mkdir`` made, the permissions that the umask gives a new file.

    safetensors makes files that only their owner can read; whoever serves a model may be another user.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666  # mkdir applied the umask, which os.umask reads only by setting
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
