"""Copies of a run's weights in an object store: ``s3://``, ``gs://``, ``hf://`` and whatever else fsspec reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config.model import ConfigError
from common.error_text import one_line
from learner.loop.checkpoints import MANIFEST

BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "az"}
"""Stores without folders, where making one would make a bucket: that of a misspelt name."""


class RemoteCopy:
    """The folder ``URL/NAME``, which gets copies of folders of the run NAME. Blocking: call it in a thread."""

    def __init__(self, url: str, name: str) -> None:
        """Raises ConfigError if the store's package is missing, or if the store takes no file."""
        import fsspec

        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(f"{url.rstrip('/')}/{name}")
            protocols = self._fs.protocol
            self._has_folders = not BUCKETS.intersection([protocols] if isinstance(protocols, str) else protocols)
            probe = f"{self._root}/.writable"
            self._make_folder(self._root)
            self._fs.pipe_file(probe, b"opcd")
            self._fs.rm_file(probe)
        except Exception as error:  # of any store's client; each has its own errors
            raise ConfigError(f"checkpoint.copy_to: {url} takes no files: {one_line(error)}") from error

    def put(self, folder: Path, name: str) -> None:
        """Replace the copy `name` by `folder`. A checkpoint's manifest, which makes it valid, goes last.

        Raises OSError for whatever the store raises.
        """
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda path: (path.name == MANIFEST, path))
        try:
            self._remove(name)
            for path in files:
                target = f"{self._root}/{name}/{path.relative_to(folder).as_posix()}"
                self._make_folder(target.rpartition("/")[0])
                self._fs.put_file(str(path), target)
        except Exception as error:  # of any store's client
            raise OSError(f"{folder} was not copied to {self._root}/{name}: {one_line(error)}") from error

    def keep(self, parent: str, names: set[str]) -> None:
        """Remove all copies in `parent` but `names`. Raises OSError as `put`."""
        try:
            for found in self._fs.ls(f"{self._root}/{parent}", detail=False):
                name = str(found).rstrip("/").rpartition("/")[2]
                if name not in names:
                    self._remove(f"{parent}/{name}")
        except Exception as error:  # of any store's client
            raise OSError(f"old copies in {self._root}/{parent} were not removed: {one_line(error)}") from error

    def _make_folder(self, folder: str) -> None:
        if self._has_folders:
            self._fs.makedirs(folder, exist_ok=True)

    def _remove(self, name: str) -> None:
        target = f"{self._root}/{name}"
        if self._fs.exists(target):
            self._fs.rm(target, recursive=True)
