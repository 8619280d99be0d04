"""The receiving end of a weight sync, for whoever holds a model: a rollout engine's worker, a teacher of the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from common.config.model import SyncConfig
from common.weight_sync import delta
from common.weight_sync.checksum import CHECKSUM_BYTES, checksum
from common.weight_sync.collective import SyncError, WeightGroup, open_group
from common.weight_sync.file_store import FileReceiver, session_of
from common.weight_sync.handshake import (
    DELTA,
    LENGTH_BYTES,
    OPENING_BYTES,
    REFUSED,
    WHOLE,
    Opening,
    bucket_name,
    misfit,
)
from common.weight_sync.host_buffers import Memory
from common.weight_sync.manifest import ITEM_BYTES, SyncManifest, TensorSpec, split_bucket
from common.weight_sync.prefetch import ahead

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Receiver(Protocol):
    """One member of a weight group that is not its sender."""

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of every weight in the manifest's order, on the receiver's device.

        Go through all of them: the sender waits. A tensor is a view of memory that stays as it is until the next
        `receive`; copy what must live longer. Raises SyncError for another plan than the sender's, for bytes that
        changed on the way, for a lost peer and for a time-out; what was taken so far must then not be used, and the
        group must be formed anew.
        """
        ...

    def close(self) -> None:
        """Leave the group; harmless when repeated."""
        ...


def open_receiver(
    sync: SyncConfig, host: str, port: int, rank: int, world_size: int, device: torch.device | str
) -> Receiver:
    """Join the weight group that the sender opens at ``host:port``, as its member `rank` (1 and up).

    Blocks until all members are there; raises SyncError when they are not within ``sync.timeout_s``. Over `file`
    nobody waits, and host and port only tell this sender's weights from those of an earlier one.
    """
    if sync.backend == "file":
        if sync.folder is None:
            raise SyncError("sync.folder: a receiver over `file` needs it; `Config.sync_in_run` fills it in")
        return FileReceiver(sync.folder, session_of(host, port), sync.timeout_s, device)
    return GroupReceiver(open_group(sync, host, port, rank, world_size, device), device, keep=sync.delta)


class GroupReceiver:
    """Receives over a wire. With `keep` it holds the last weights in host memory, to apply deltas to."""

    def __init__(self, group: WeightGroup, device: torch.device | str, *, keep: bool) -> None:
        self._group = group
        self._device = device
        self._keep = keep
        self._memory = Memory(group.wire.device)
        self._held: list[Tensor] = []
        self._serial = 0
        """Of the sync that `_held` is from; 0: it is from none, or was broken off."""

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """See `Receiver`."""
        complete = False
        try:
            for bucket, data in ahead(self._buckets(manifest)):
                for spec, tensor in split_bucket(bucket, data):
                    yield spec.name, tensor.to(self._device)
            complete = True
        finally:
            if not complete:
                self.close()  # the others hear of it now, not when their time is over

    def close(self) -> None:
        """Leave the group."""
        self._held, self._serial, self._memory = [], 0, Memory(self._group.wire.device)
        self._group.close()

    def _buckets(self, manifest: SyncManifest) -> Iterator[tuple[tuple[TensorSpec, ...], Tensor]]:
        opening, answer = self._open(manifest)
        held, self._serial = (self._held, 0) if self._keep else ([], 0)
        for index, bucket in enumerate(manifest.buckets()):
            what = bucket_name(index, bucket)
            if answer == DELTA:
                data = held[index]
                if not self._patched(data, bucket, what):
                    self._whole(data, what)
            else:
                data = self._memory.lend(sum(spec.nbytes for spec in bucket))
                self._whole(data, what)
                if self._keep:
                    held[index:] = [data]
            yield bucket, data
        self._held, self._serial = held, opening.serial

    def _open(self, manifest: SyncManifest) -> tuple[Opening, int]:
        opening = Opening.unpack(self._group.control.tell(bytes(OPENING_BYTES), "the manifest"))
        fault = misfit(opening, manifest)
        if fault is not None or opening is None:
            self._group.control.agree(REFUSED, "the manifest")
            raise SyncError(str(fault))
        able = DELTA if opening.base and opening.base == self._serial else WHOLE
        answer = self._group.control.agree(able, "the manifest")
        if answer == REFUSED:
            raise SyncError("weight sync broke at the manifest: another receiver refused it")
        return opening, answer

    def _whole(self, data: Tensor, what: str) -> None:
        self._group.wire.broadcast(data, what)
        if not self._matches(data, what):
            raise SyncError(f"{what} arrived with other bytes than were sent, here or at another receiver")

    def _patched(self, data: Tensor, bucket: tuple[TensorSpec, ...], what: str) -> bool:
        """Apply a delta in place; False where `data` is not what the sender has, here or at another receiver."""
        length = int.from_bytes(self._group.control.tell(bytes(LENGTH_BYTES), f"the length of {what}"), "little")
        if not length:
            return False  # a delta would be no shorter
        patch = self._memory.lend(length)
        self._group.wire.broadcast(patch, f"the delta of {what}")
        with suppress(delta.DeltaError):  # leaves `data` in pieces, with another checksum than the sender's
            delta.apply(data.numpy(), patch.numpy(), ITEM_BYTES[bucket[0].dtype])
        return self._matches(data, what)

    def _matches(self, data: Tensor, what: str) -> bool:
        """Compare checksums with the sender; True where all receivers' fit."""
        found = checksum(data)
        meant = self._group.control.tell(bytes(CHECKSUM_BYTES), f"the checksum of {what}")
        return bool(self._group.control.agree(int(meant == found), f"the checksum of {what}"))
