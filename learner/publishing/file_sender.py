"""Publishing to a shared folder: each version is a set of safetensors under their checkpoint names."""

from __future__ import annotations

import time
from collections.abc import Iterable

from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync.collective import SyncError
from common.weight_sync.file_store import VersionWriter, session_name
from common.weight_sync.manifest import SyncManifest, TensorSpec
from common.weight_sync.transports import host_buffer
from learner.publishing.packer import BucketPacker, SendReport


class FileSender:
    """Writes versions into ``sync.folder``; readers may take any time."""

    def __init__(self, sync: SyncConfig, host: str, port: int) -> None:
        if sync.folder is None:
            raise SyncError("sync.folder: a sender over `file` needs it; `Config.sync_in_run` fills it in")
        self._folder = sync.folder
        self._session = session_name(host, port)
        self._packer = BucketPacker(host_buffer)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SyncError(f"sync.folder: {self._folder} cannot be created: {error}") from error

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """See `learner.publishing.sender.Sender`; the version's folder appears when all of it is on disk."""
        started = time.monotonic()
        try:
            writer = VersionWriter(self._folder, manifest, self._session)

            def write(index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
                writer.add(index, data, digest)
                return data.numel()

            total = self._packer.send_all(tensors, manifest, write)
            writer.commit()
        except OSError as error:
            raise SyncError(f"sync.folder: version {manifest.version} could not be written: {error}") from error
        return SendReport(total, time.monotonic() - started, manifest.nbytes)

    def close(self) -> None:
        """Do nothing: no resource is held."""
