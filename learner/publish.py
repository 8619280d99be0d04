"""The learner's end of a weight sync: named tensors out, in the manifest's order, bucket by bucket."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from common.collective import SENDER, SyncError, broadcast, gloo_group, manifest_digest, wire_digest
from common.weights import SyncManifest, TensorSpec


@dataclass(frozen=True, slots=True)
class SendReport:
    """One sync: bytes on the wire and seconds from the first to the last of them."""

    bytes: int
    seconds: float


class Sender(Protocol):
    """Rank 0 of a weight group."""

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """Send all tensors of `manifest`; raises SyncError where they do not fit it or a receiver is lost."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


def open_sender(backend: str, host: str, port: int, world_size: int, timeout_s: float) -> Sender:
    """Join the weight group as its sender; blocks until every engine has joined."""
    if backend == "gloo":
        return GlooSender(host, port, world_size, timeout_s)
    return NcclSender(host, port, world_size)


class GlooSender:
    """Sends over gloo; any device, through host memory."""

    def __init__(self, host: str, port: int, world_size: int, timeout_s: float) -> None:
        self._group = gloo_group(host, port, SENDER, world_size, timeout_s)

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """The manifest's digest, then every bucket and its own digest."""
        started = time.monotonic()
        broadcast(self._group, manifest_digest(manifest.digest()), "the manifest")
        stream = iter(tensors)
        total = 0
        for index, bucket in enumerate(manifest.buckets()):
            data = pack_bucket(bucket, stream)
            broadcast(self._group, data, f"bucket {index}")
            broadcast(self._group, wire_digest(data), f"the digest of bucket {index}")
            total += data.numel()
        _expect_end(stream)
        return SendReport(total, time.monotonic() - started)

    def close(self) -> None:
        """Leave the group."""
        self._group.shutdown()


class NcclSender:
    """Sends over vLLM's own packed nccl broadcast, to its built-in ``nccl`` engine."""

    def __init__(self, host: str, port: int, world_size: int) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group = trainer_init({"master_address": host, "master_port": port, "world_size": world_size})

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """All tensors through packed buffers of the manifest's bucket size."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        started = time.monotonic()
        packed_nccl_broadcast_producer(
            iterator=_checked(tensors, manifest),
            group=self._group,
            src=SENDER,
            post_iter_func=lambda pair: pair[1],
            buffer_size_bytes=manifest.bucket_bytes,
        )
        torch.cuda.synchronize()
        return SendReport(sum(spec.nbytes for spec in manifest.tensors), time.monotonic() - started)

    def close(self) -> None:
        """Leave the group."""
        self._group.destroy()


def pack_bucket(bucket: tuple[TensorSpec, ...], stream: Iterator[tuple[str, Tensor]]) -> Tensor:
    """The next tensors of `stream` as one contiguous byte tensor; raises SyncError where they are not the bucket's."""
    data = torch.empty(sum(spec.nbytes for spec in bucket), dtype=torch.uint8)
    offset = 0
    for spec in bucket:
        tensor = _next(stream, spec)
        end = offset + spec.nbytes
        data[offset:end].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        offset = end
    return data


def _checked(tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
    stream = iter(tensors)
    for spec in manifest.tensors:
        yield spec.name, _next(stream, spec).detach().contiguous()
    _expect_end(stream)


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
