"""Publishing to a shared folder: every version a set of safetensors under its checkpoint names."""

from __future__ import annotations

import time
from collections.abc import Iterable

from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync.collective import SyncError
from common.weight_sync.file_store import VersionWriter, session_of
from common.weight_sync.host_buffers import host_buffer
from common.weight_sync.manifest import SyncManifest, TensorSpec
from learner.publishing.packer import Packer, SendReport


class FileSender:
    """Writes versions into ``sync.folder``; whoever reads them takes the time it needs."""

    def __init__(self, sync: SyncConfig, host: str, port: int) -> None:
        if sync.folder is None:
            raise SyncError("sync.folder: a sender over `file` needs it; `Config.sync_in_run` fills it in")
        self._folder = sync.folder
        self._session = session_of(host, port)
        self._packer = Packer(host_buffer)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SyncError(f"sync.folder: {self._folder} cannot be made: {error}") from error

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """See `Sender`; nothing shows under the version's name until all of it is on disk."""
        started = time.monotonic()
        try:
            writer = VersionWriter(self._folder, manifest, self._session)

            def write(index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
                writer.add(index, data, digest)
                return data.numel()

            total = self._packer.each_bucket(tensors, manifest, write)
            writer.commit()
        except OSError as error:
            raise SyncError(f"sync.folder: version {manifest.version} could not be written: {error}") from error
        return SendReport(total, time.monotonic() - started, manifest.nbytes)

    def close(self) -> None:
        """Nothing is held."""
