"""Writing a task's folder: all of it or nothing, rows as JSON lines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.files import apply_umask


class PrepareError(Exception):
    """A model or task that cannot be prepared; the text holds the remedy."""


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, rename it to `folder` at the end, and remove it after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    partial = private / folder.name
    partial.mkdir()
    try:
        yield partial
        apply_umask(partial)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
