"""Packing of the learner's tensors into the buckets of a manifest, one bucket ahead of the sender."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.weight_sync.checksum import checksum
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec, bucket_nbytes

SendBucket = Callable[[int, tuple[TensorSpec, ...], Tensor, bytes], int]
"""(index, bucket, its bytes, their checksum) -> bytes sent."""


@dataclass(frozen=True, slots=True)
class SendReport:
    """One sync: bytes sent, seconds from the first to the last of them, bytes of all tensors (more, with deltas)."""

    bytes: int
    seconds: float
    weight_bytes: int


class BucketPacker:
    """Packs buckets into two buffers kept from sync to sync: one is packed while the other is sent."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        """`allocate` returns a flat byte tensor in memory that the weights can be sent from."""
        self._allocate = allocate
        self._buffers: list[Tensor] = []

    def send_all(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest, send: SendBucket) -> int:
        """Call `send` for every bucket in order, one at a time, on another thread; returns the sum of its results.

        Only the calling thread iterates `tensors`, since that may be a collective. Raises SyncError if they differ
        from those of `manifest`.
        """
        stream = iter(tensors)
        buckets = list(manifest.buckets())
        self._reserve(max(map(bucket_nbytes, buckets), default=0))
        total = 0
        pending: Future[int] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="publish") as pool:
            for index, bucket in enumerate(buckets):
                data = pack_bucket(bucket, stream, self._buffers[index % 2])
                digest = checksum(data)
                if pending is not None:
                    total += pending.result()
                pending = pool.submit(send, index, bucket, data, digest)
            if pending is not None:
                total += pending.result()
        _expect_end(stream)
        return total

    def _reserve(self, nbytes: int) -> None:
        if not self._buffers or self._buffers[0].numel() < nbytes:
            self._buffers = []  # free the old ones first
            self._buffers = [self._allocate(nbytes) for _ in range(2)]


def pack_bucket(bucket: tuple[TensorSpec, ...], stream: Iterator[tuple[str, Tensor]], memory: Tensor) -> Tensor:
    """Copy the next tensors of `stream` into `memory`, without gaps; raises SyncError if they are not the bucket's."""
    offset = 0
    for spec in bucket:
        tensor = _next(stream, spec)
        end = offset + spec.nbytes
        copy_bytes(memory[offset:end], tensor.detach().reshape(-1).view(torch.uint8))
        offset = end
    return memory[:offset]


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy between flat byte tensors; within host memory on this thread alone.

    torch would split the copy over its thread pool, whose threads then spin on cores that the sending thread and the
    receivers need.
    """
    if target.device.type == source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def _next(stream: Iterator[tuple[str, Tensor]], spec: TensorSpec) -> Tensor:
    pair = next(stream, None)
    if pair is None:
        raise SyncError(f"the learner's weights ended before {spec.name} of the manifest")
    name, tensor = pair
    actual = TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if actual != spec:
        raise SyncError(f"the learner's next weight is {actual}, the manifest has {spec}")
    return tensor


def _expect_end(stream: Iterator[tuple[str, Tensor]]) -> None:
    extra = next(stream, None)
    if extra is not None:
        raise SyncError(f"the learner has {extra[0]} beyond the end of the manifest")
