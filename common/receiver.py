"""The receiving end of a weight sync, for whoever holds a model: a rollout engine's worker, a teacher of the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from common.collective import DIGEST_BYTES, SyncError, broadcast, gloo_group, manifest_digest, wire_digest
from common.config import SyncConfig
from common.weights import SyncManifest, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroupGloo


class Receiver(Protocol):
    """One member of a weight group that is not its sender."""

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of every weight in the manifest's order, on the receiver's device.

        Go through all of them: the sender waits. A tensor is a view of memory that stays as it is until the next
        `receive`; copy what must live longer. Raises SyncError for another plan than the sender's, for bytes that
        changed on the way, for a lost peer and for a time-out; what was taken so far must then not be used.
        """
        ...

    def close(self) -> None:
        """Leave the group; harmless when repeated."""
        ...


def open_receiver(
    sync: SyncConfig, host: str, port: int, rank: int, world_size: int, device: torch.device | str
) -> Receiver:
    """Join the weight group that the sender opens at ``host:port``, as its member `rank` (1 and up).

    Blocks until all members are there; raises SyncError when they are not within ``sync.timeout_s``.
    """
    if sync.backend != "gloo":
        raise SyncError(f"sync.backend: nothing receives over `{sync.backend}` here; use `gloo`")
    return GlooReceiver(gloo_group(host, port, rank, world_size, sync.timeout_s), device)


class GlooReceiver:
    """Receives over gloo, through host memory."""

    def __init__(self, group: ProcessGroupGloo, device: torch.device | str) -> None:
        self._group: ProcessGroupGloo | None = group
        self._device = device

    def receive(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """See `Receiver`; every bucket's bytes are checked against the digest that follows them."""
        for bucket, data in self._buckets(manifest):
            for spec, tensor in split_bucket(bucket, data):
                yield spec.name, tensor.to(self._device)

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.shutdown()
            self._group = None

    def _buckets(self, manifest: SyncManifest) -> Iterator[tuple[tuple[TensorSpec, ...], Tensor]]:
        import torch

        if self._group is None:
            raise SyncError("weights were announced to a receiver that has left its group")
        announced = torch.empty(32, dtype=torch.uint8)
        broadcast(self._group, announced, "the manifest")
        if not announced.equal(manifest_digest(manifest.digest())):
            raise SyncError(
                f"the sender's manifest is {announced.numpy().tobytes().hex()}, this receiver's {manifest.digest()}: "
                "learner and receiver do not agree on names, shapes, types or bucket size"
            )
        for index, bucket in enumerate(manifest.buckets()):
            # A bucket of its own each time: layerwise reload may keep tensors until their layer is complete.
            data = torch.empty(sum(spec.nbytes for spec in bucket), dtype=torch.uint8)
            broadcast(self._group, data, f"bucket {index}")
            digest = torch.empty(DIGEST_BYTES, dtype=torch.uint8)
            broadcast(self._group, digest, f"the digest of bucket {index}")
            if not digest.equal(wire_digest(data)):
                raise SyncError(f"bucket {index} ({bucket[0].name} ...) arrived with other bytes than were sent")
            yield bucket, data


def split_bucket(bucket: tuple[TensorSpec, ...], data: Tensor) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Views of a bucket's bytes as its tensors."""
    import torch

    offset = 0
    for spec in bucket:
        end = offset + spec.nbytes
        dtype: Any = getattr(torch, spec.dtype)
        yield spec, data[offset:end].view(dtype).view(spec.shape)
        offset = end
