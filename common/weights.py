"""What travels in one weight sync: the same list, in the same order, cut into the same buckets on both sides."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor under its checkpoint name; ``dtype`` is torch's name without the prefix (``float32``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SyncManifest:
    """The plan of a sync: tensors in sending order, cut greedily into buckets of at most ``bucket_bytes`` (a larger
    tensor has a bucket to itself). Buckets never mix element types.
    """

    tensors: tuple[TensorSpec, ...]
    bucket_bytes: int

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
        """Hex sha256 of the plan: both sides compare it before a byte is sent."""
        text = "\n".join(f"{t.name} {t.dtype} {t.shape}" for t in self.tensors) + f"\n{self.bucket_bytes}"
        return hashlib.sha256(text.encode()).hexdigest()
