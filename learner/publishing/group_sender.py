"""Publishing to a weight group: whole buckets over any wire, or, over gloo, what changed since the last sync."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync import delta
from common.weight_sync.collective import SENDER, SyncError, open_group
from common.weight_sync.handshake import DELTA, LENGTH_BYTES, REFUSED, Opening, bucket_name
from common.weight_sync.manifest import ITEM_BYTES, SyncManifest, TensorSpec
from learner.publishing.packer import Packer, SendReport, copy_bytes


class GroupSender:
    """The sender of a weight group. With ``sync.delta`` it holds the weights of the last sync in host memory.

    A delta is offered from the second sync on. One receiver that does not hold its base, or that ends up with other
    bytes, gets the bucket whole, and so do all: a broadcast has no exceptions.
    """

    def __init__(
        self, sync: SyncConfig, host: str, port: int, world_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self._group = open_group(sync, host, port, SENDER, world_size, device)
        self._packer = Packer(self._group.wire.allocate)
        self._keep = sync.delta
        self._held: list[Tensor] = []
        self._held_digest = ""
        self._serial = 0

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """See `Sender`: the plan, then every bucket and its checksum; each is confirmed by all receivers."""
        started = time.monotonic()
        complete = False
        try:
            deltas = self._open(manifest)

            def send(index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
                sent = (self._delta if deltas else self._whole)(index, bucket, data, digest)
                if self._keep:
                    self._hold(index, data)
                return sent

            total = self._packer.each_bucket(tensors, manifest, send)
            complete = True
        finally:
            if not complete:
                self.close()  # receivers hear of it now, not when their time is over
        return SendReport(total, time.monotonic() - started, manifest.nbytes)

    def close(self) -> None:
        """Leave the group."""
        self._held, self._held_digest = [], ""
        self._group.close()

    def _open(self, manifest: SyncManifest) -> bool:
        """Announce the plan; True where every receiver takes deltas."""
        digest = manifest.digest()
        base = self._serial if self._held and self._held_digest == digest else 0
        self._serial += 1
        self._group.control.tell(Opening(digest, manifest.version, self._serial, base).pack(), "the manifest")
        answer = self._group.control.agree(DELTA, "the manifest")
        if answer == REFUSED:
            raise SyncError("a receiver refused the manifest; its own error says why")
        if answer != DELTA or not base:
            self._held = []
        self._held_digest = digest
        return bool(self._held)

    def _whole(self, index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
        what = bucket_name(index, bucket)
        self._group.wire.broadcast(data, what)
        if not self._confirmed(digest, what):
            raise SyncError(f"{what} arrived with other bytes than were sent")
        return data.numel()

    def _delta(self, index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
        what = bucket_name(index, bucket)
        patch = delta.encode(self._held[index].numpy(), data.numpy(), ITEM_BYTES[bucket[0].dtype])
        length = 0 if patch is None else len(patch)
        self._group.control.tell(length.to_bytes(LENGTH_BYTES, "little"), f"the length of {what}")
        if patch is None:
            return self._whole(index, bucket, data, digest)
        self._group.wire.broadcast(torch.from_numpy(patch), f"the delta of {what}")
        if self._confirmed(digest, what):
            return length
        return length + self._whole(index, bucket, data, digest)

    def _confirmed(self, digest: bytes, what: str) -> bool:
        self._group.control.tell(digest, f"the checksum of {what}")
        return bool(self._group.control.agree(1, f"the checksum of {what}"))

    def _hold(self, index: int, data: Tensor) -> None:
        if index < len(self._held):
            copy_bytes(self._held[index], data)
        else:
            self._held.append(data.clone())
