"""Permissions of written files, the place of missing ones, and files that hold a key."""

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


def read_key(path: Path, name: str) -> str:
    """Read the key from a file that holds nothing else. `name` is the configuration key, for errors.

    Raises ValueError, which never shows the file's content.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} {path} cannot be read: {type(error).__name__}") from None
    if not key.isascii() or not key.isprintable() or len(key.split()) != 1:
        raise ValueError(f"{name} {path} must hold one key and nothing else")
    return key
