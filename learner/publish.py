"""The learner's end of a weight sync: named tensors out, in the manifest's order, bucket by bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from common.collective import SyncError
from common.config import SyncConfig
from common.weights import SyncManifest, TensorSpec

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
        from learner.publish_file import FileSender

        return FileSender(sync, host, port)
    from learner.publish_group import GroupSender

    return GroupSender(sync, host, port, world_size, device)


def each_bucket(
    tensors: Iterable[tuple[str, Tensor]],
    manifest: SyncManifest,
    device: torch.device,
    send: Callable[[int, tuple[TensorSpec, ...], Tensor], int],
) -> int:
    """Call `send` (number, bucket, bytes on `device`) for every bucket in order, one at a time, on another thread.

    The next bucket is gathered and packed while one is sent: tensors are only asked for by the calling thread, since
    that may be a collective. Two buckets of memory. Returns the sum of what `send` returns.
    """
    stream = iter(tensors)
    buckets = list(manifest.buckets())
    largest = max((sum(spec.nbytes for spec in bucket) for bucket in buckets), default=0)
    memory = [buffer(largest, device) for _ in range(min(2, len(buckets)))]
    total = 0
    under_way: Future[int] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="publish") as pool:
        for index, bucket in enumerate(buckets):
            data = pack_bucket(bucket, stream, memory[index % 2])
            if under_way is not None:
                total += under_way.result()
            under_way = pool.submit(send, index, bucket, data)
        if under_way is not None:
            total += under_way.result()
    _expect_end(stream)
    return total


def buffer(nbytes: int, device: torch.device) -> Tensor:
    """Undefined bytes; in host memory they are pinned where weights come from a GPU."""
    pinned = device.type == "cpu" and torch.cuda.is_available()
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)


def pack_bucket(bucket: tuple[TensorSpec, ...], stream: Iterator[tuple[str, Tensor]], memory: Tensor) -> Tensor:
    """The next tensors of `stream` one after the other in `memory`; SyncError where they are not the bucket's."""
    offset = 0
    for spec in bucket:
        tensor = _next(stream, spec)
        end = offset + spec.nbytes
        memory[offset:end].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        offset = end
    return memory[:offset]


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
