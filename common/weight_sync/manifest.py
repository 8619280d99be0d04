"""Plan of a weight sync: the same tensors, in the same order, cut into the same buckets at both ends."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor under its checkpoint name; ``dtype`` is torch's name without the prefix (``float32``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SyncManifest:
    """Tensors in sending order, cut greedily into buckets of at most ``bucket_bytes``.

    A larger tensor gets its own bucket. A bucket holds one element type. `version` is the version that the weights will
    get; it may be None, except for a receiver over `file`.
    """

    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int
    version: int | None = None

    def at(self, version: int) -> SyncManifest:
        """Copy of the plan for another version."""
        return replace(self, version=version)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def buckets(self) -> Iterator[tuple[TensorSpec, ...]]:
        """Buckets in order."""
        bucket: list[TensorSpec] = []
        size = 0
        for tensor in self.tensors:
            if bucket and (size + tensor.nbytes > self.bucket_bytes or tensor.dtype != bucket[0].dtype):
                yield tuple(bucket)
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        if bucket:
            yield tuple(bucket)

    def digest(self) -> str:
        """Hex sha256 of the plan without its version; both ends compare it before any weights are sent."""
        text = "\n".join(f"{t.name} {t.dtype} {t.shape}" for t in self.tensors) + f"\n{self.bucket_bytes}"
        return hashlib.sha256(text.encode()).hexdigest()


def bucket_nbytes(bucket: tuple[TensorSpec, ...]) -> int:
    """Bytes of a bucket's tensors."""
    return sum(spec.nbytes for spec in bucket)


def split_bucket(bucket: tuple[TensorSpec, ...], data: Tensor) -> Iterator[tuple[TensorSpec, Tensor]]:
    """Views of a bucket's bytes as its tensors."""
    import torch

    offset = 0
    for spec in bucket:
        end = offset + spec.nbytes
        dtype: Any = getattr(torch, spec.dtype)
        yield spec, data[offset:end].view(dtype).view(spec.shape)
        offset = end
