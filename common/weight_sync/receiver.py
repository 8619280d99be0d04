"""Receiving end of a weight sync, for any holder of a model: a rollout engine's worker, a live teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from common.config.model import SyncConfig
from common.weight_sync import delta
from common.weight_sync.checksum import CHECKSUM_BYTES, checksum
from common.weight_sync.collective import SyncError
from common.weight_sync.file_store import FileReceiver, session_name
from common.weight_sync.handshake import DELTA, HANDSHAKE_BYTES, REFUSED, WHOLE, Handshake, bucket_label, refusal
from common.weight_sync.manifest import ITEM_BYTES, SyncManifest, TensorSpec, bucket_nbytes, split_bucket
from common.weight_sync.prefetch import prefetch
from common.weight_sync.transports import WeightGroup, open_group

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Receiver(Protocol):
    """A member of a weight group other than its sender."""

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """Yield (checkpoint name, tensor) of every weight in the manifest's order, on the receiver's device.

        Consume all of them: the sender waits. The next `receive` may overwrite the tensors; copy them to keep them.
        Raises SyncError if the sender's plan differs, if bytes changed in transit, if a peer is lost, or after a
        timeout; then discard what was received and form a new group.
        """
        ...

    def close(self) -> None:
        """Leave the group; safe to repeat."""
        ...


def open_receiver(
    sync: SyncConfig, host: str, port: int, rank: int, world_size: int, device: torch.device | str
) -> Receiver:
    """Join the weight group that the sender opens at ``host:port``, as member `rank` (1 and up).

    Blocks until all members have joined; raises SyncError if they have not within ``sync.timeout_s``. Over `file`
    there is no group to wait for: host and port only tell this sender's weights from an earlier sender's.
    """
    if sync.backend == "file":
        if sync.folder is None:
            raise SyncError("sync.folder: a receiver over `file` needs it; `Config.sync_in_run` fills it in")
        return FileReceiver(sync.folder, session_name(host, port), sync.timeout_s, device)
    return GroupReceiver(open_group(sync, host, port, rank, world_size, device), device, keep_weights=sync.delta)


class GroupReceiver:
    """Receives over a transport; `keep_weights` keeps the last weights in host memory as the base of deltas."""

    def __init__(self, group: WeightGroup, device: torch.device | str, *, keep_weights: bool) -> None:
        self._group = group
        self._device = device
        self._keep_weights = keep_weights
        self._base: list[Tensor] = []
        self._base_serial = 0
        """Serial of the sync that `_base` holds; 0: none, or an interrupted one."""

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """See `Receiver`."""
        complete = False
        try:
            for bucket, data in prefetch(self._buckets(manifest)):
                for spec, tensor in split_bucket(bucket, data):
                    yield spec.name, tensor.to(self._device)
            complete = True
        finally:
            if not complete:
                self.close()  # the other members fail now, not after their timeout

    def close(self) -> None:
        """See `Receiver`."""
        self._base, self._base_serial = [], 0
        self._group.close()

    def _buckets(self, manifest: SyncManifest) -> Iterator[tuple[tuple[TensorSpec, ...], Tensor]]:
        serial, deltas = self._shake_hands(manifest)
        base, self._base_serial = (self._base, 0) if self._keep_weights else ([], 0)
        for index, bucket in enumerate(manifest.buckets()):
            label = bucket_label(index, bucket)
            if deltas:
                data = base[index]
                if not self._receive_delta(data, bucket, label):
                    self._receive_whole(data, label)
            else:
                data = self._buffer(bucket_nbytes(bucket))
                self._receive_whole(data, label)
                if self._keep_weights:
                    base[index:] = [data]
            yield bucket, data
        self._base, self._base_serial = base, serial

    def _shake_hands(self, manifest: SyncManifest) -> tuple[int, bool]:
        """Compare plans; returns (serial of this sync, whether buckets come as deltas)."""
        handshake = Handshake.decode(self._group.control.broadcast_bytes(bytes(HANDSHAKE_BYTES), "the manifest"))
        refused = refusal(handshake, manifest)
        if refused is not None or handshake is None:
            self._group.control.allreduce_min(REFUSED, "the manifest")
            raise SyncError(str(refused))
        reply = DELTA if handshake.base and handshake.base == self._base_serial else WHOLE
        agreed = self._group.control.allreduce_min(reply, "the manifest")
        if agreed == REFUSED:
            raise SyncError("weight sync broke at the manifest: another receiver refused it")
        return handshake.serial, agreed == DELTA

    def _buffer(self, nbytes: int) -> Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=self._group.transport.device)

    def _receive_whole(self, data: Tensor, label: str) -> None:
        self._group.transport.broadcast(data, label)
        if not self._verified(data, label):
            raise SyncError(f"{label} arrived with other bytes than were sent, here or at another receiver")

    def _receive_delta(self, data: Tensor, bucket: tuple[TensorSpec, ...], label: str) -> bool:
        """Apply a delta to `data` in place; False if this or another receiver now differs from the sender."""
        length = self._group.control.broadcast_int(0, f"the length of {label}")
        if not length:
            return False  # a delta would not be shorter: the bucket comes whole
        patch = self._buffer(length)
        self._group.transport.broadcast(patch, f"the delta of {label}")
        with suppress(delta.DeltaError):  # leaves `data` partly changed: its checksum then differs
            delta.apply(data.numpy(), patch.numpy(), ITEM_BYTES[bucket[0].dtype])
        return self._verified(data, label)

    def _verified(self, data: Tensor, label: str) -> bool:
        """Compare checksums with the sender; True if those of all receivers agree."""
        actual = checksum(data)
        expected = self._group.control.broadcast_bytes(bytes(CHECKSUM_BYTES), f"the checksum of {label}")
        return bool(self._group.control.allreduce_min(int(expected == actual), f"the checksum of {label}"))
