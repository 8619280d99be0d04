"""The learner's end of a weight sync: named tensors out, in the manifest's order, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync.checksum import checksum
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class SendReport:
    """One sync: bytes that travelled, seconds from the first to the last of them, and the bytes of all tensors (more
    than travelled, where only changes were sent).
    """

    bytes: int
    seconds: float
    weight_bytes: int


class Sender(Protocol):
    """Rank 0 of a weight group."""

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """Send all tensors of `manifest`; raises SyncError where they do not fit it or a receiver is lost.

        After an error the group is left: open a new sender, and let the receivers join it, before the next one.
        """
        ...

    def close(self) -> None:
        """Leave the group; harmless when repeated."""
        ...


def open_sender(sync: SyncConfig, host: str, port: int, world_size: int, device: torch.device | str = "cpu") -> Sender:
    """Open the weight group as its sender; blocks until every receiver has joined. `device`: where the weights lie."""
    if sync.backend == "file":
        from learner.publishing.file_sender import FileSender

        return FileSender(sync, host, port)
    from learner.publishing.group_sender import GroupSender

    return GroupSender(sync, host, port, world_size, device)


class Packer:
    """Two buckets of memory, kept from sync to sync: the next bucket is packed while one is sent."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        """`allocate`: a flat tensor of so many bytes, where the weights are sent from."""
        self._allocate = allocate
        self._memory: list[Tensor] = []

    def each_bucket(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        manifest: SyncManifest,
        send: Callable[[int, tuple[TensorSpec, ...], Tensor, bytes], int],
    ) -> int:
        """Call `send` (number, bucket, its bytes, their checksum) for every bucket in order, one at a time, on another
        thread.

        Tensors are only asked for by the calling thread, since that may be a collective. Returns the sum of what
        `send` returns; raises SyncError where the tensors are not those of `manifest`.
        """
        stream = iter(tensors)
        buckets = list(manifest.buckets())
        self._reserve(max((sum(spec.nbytes for spec in bucket) for bucket in buckets), default=0))
        total = 0
        under_way: Future[int] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="publish") as pool:
            for index, bucket in enumerate(buckets):
                data = pack_bucket(bucket, stream, self._memory[index % 2])
                digest = checksum(data)
                if under_way is not None:
                    total += under_way.result()
                under_way = pool.submit(send, index, bucket, data, digest)
            if under_way is not None:
                total += under_way.result()
        _expect_end(stream)
        return total

    def _reserve(self, nbytes: int) -> None:
        if not self._memory or self._memory[0].numel() < nbytes:
            self._memory = []
            self._memory = [self._allocate(nbytes) for _ in range(2)]


def pack_bucket(bucket: tuple[TensorSpec, ...], stream: Iterator[tuple[str, Tensor]], memory: Tensor) -> Tensor:
    """The next tensors of `stream` one after the other in `memory`; SyncError where they are not the bucket's."""
    offset = 0
    for spec in bucket:
        tensor = _next(stream, spec)
        end = offset + spec.nbytes
        copy_bytes(memory[offset:end], tensor.detach().reshape(-1).view(torch.uint8))
        offset = end
    return memory[:offset]


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """Copy between flat byte tensors; within host memory on this thread alone.

    torch would share the work with its pool, whose threads then spin for the next piece on cores that the sending
    thread and the receivers need.
    """
    if target.device.type == source.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)


def _next(stream: Iterator[tuple[str, Tensor]], spec: TensorSpec) -> Tensor:
    pair = next(stream, None)
    if pair is None:
        raise SyncError(f"the learner's weights ended where the manifest has {spec.name}")
    name, tensor = pair
    found = TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if found != spec:
        raise SyncError(f"the learner's next weight is {found}, the manifest has {spec}")
    return tensor


def _expect_end(stream: Iterator[tuple[str, Tensor]]) -> None:
    extra = next(stream, None)
    if extra is not None:
        raise SyncError(f"the learner has {extra[0]} beyond the end of the manifest")
