"""Publishing to a weight group: whole buckets over any transport or, over gloo, deltas against the last sync."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync import delta
from common.weight_sync.collective import SENDER, SyncError
from common.weight_sync.handshake import DELTA, REFUSED, Handshake, bucket_label
from common.weight_sync.manifest import ITEM_BYTES, SyncManifest, TensorSpec
from common.weight_sync.transports import open_group
from learner.publishing.packer import BucketPacker, SendReport, copy_bytes


class GroupSender:
    """The sender of a weight group. With ``sync.delta`` it keeps the weights of the last sync in host memory.

    Deltas are offered from the second sync on. A broadcast reaches every receiver: if one of them does not hold the
    base, or ends up with other bytes, all of them get the bucket whole.
    """

    def __init__(
        self, sync: SyncConfig, host: str, port: int, world_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self._group = open_group(sync, host, port, SENDER, world_size, device)
        self._packer = BucketPacker(self._group.transport.allocate)
        self._keep_weights = sync.delta
        self._base: list[Tensor] = []
        self._base_digest = ""
        self._serial = 0

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """See `learner.publishing.sender.Sender`; all receivers confirm the plan and the checksum of each bucket."""
        started = time.monotonic()
        complete = False
        try:
            send_bucket = self._send_delta if self._shake_hands(manifest) else self._send_whole

            def send(index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
                sent = send_bucket(index, bucket, data, digest)
                if self._keep_weights:
                    self._keep(index, data)
                return sent

            total = self._packer.send_all(tensors, manifest, send)
            complete = True
        finally:
            if not complete:
                self.close()  # the receivers fail now, not after their timeout
        return SendReport(total, time.monotonic() - started, manifest.nbytes)

    def close(self) -> None:
        """See `learner.publishing.sender.Sender`."""
        self._base, self._base_digest = [], ""
        self._group.close()

    def _shake_hands(self, manifest: SyncManifest) -> bool:
        """Announce the plan; True if every receiver takes deltas."""
        digest = manifest.digest()
        base = self._serial if self._base and self._base_digest == digest else 0
        self._serial += 1
        message = Handshake(digest, manifest.version, self._serial, base).encode()
        self._group.control.broadcast_bytes(message, "the manifest")
        agreed = self._group.control.allreduce_min(DELTA, "the manifest")
        if agreed == REFUSED:
            raise SyncError("a receiver refused the manifest; its own error says why")
        if agreed != DELTA or not base:
            self._base = []
        self._base_digest = digest
        return bool(self._base)

    def _send_whole(self, index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
        label = bucket_label(index, bucket)
        self._group.transport.broadcast(data, label)
        if not self._confirmed(digest, label):
            raise SyncError(f"{label} arrived with other bytes than were sent")
        return data.numel()

    def _send_delta(self, index: int, bucket: tuple[TensorSpec, ...], data: Tensor, digest: bytes) -> int:
        label = bucket_label(index, bucket)
        patch = delta.encode(self._base[index].numpy(), data.numpy(), ITEM_BYTES[bucket[0].dtype])
        length = 0 if patch is None else len(patch)
        self._group.control.broadcast_int(length, f"the length of {label}")
        if patch is None:
            return self._send_whole(index, bucket, data, digest)
        self._group.transport.broadcast(torch.from_numpy(patch), f"the delta of {label}")
        if self._confirmed(digest, label):
            return length
        return length + self._send_whole(index, bucket, data, digest)

    def _confirmed(self, digest: bytes, label: str) -> bool:
        self._group.control.broadcast_bytes(digest, f"the checksum of {label}")
        return bool(self._group.control.allreduce_min(1, f"the checksum of {label}"))

    def _keep(self, index: int, data: Tensor) -> None:
        if index < len(self._base):
            copy_bytes(self._base[index], data)
        else:
            self._base.append(data.clone())
