"""What members of a weight group say to each other: the plan, which all compare before a byte of it moves."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common.weight_sync.manifest import SyncManifest, TensorSpec

WIRE_FORMAT = 1
_LAYOUT = struct.Struct("<I32sqQQ")
OPENING_BYTES = _LAYOUT.size

REFUSED, WHOLE, DELTA = range(3)
"""A receiver's answer, the lowest of all counts: it does not have this plan; it takes whole buckets; it also holds the
sender's `base` and takes deltas."""

NO_VERSION = -1
LENGTH_BYTES = 8
"""Of a delta's length, little-endian; 0: the bucket comes whole."""


@dataclass(frozen=True, slots=True)
class Opening:
    """`serial` counts the sender's syncs in this group from 1; `base` is the serial that deltas would build on (0:
    none are offered).
    """

    digest: str
    version: int | None
    serial: int
    base: int

    def pack(self) -> bytes:
        """As it travels."""
        version = NO_VERSION if self.version is None else self.version
        return _LAYOUT.pack(WIRE_FORMAT, bytes.fromhex(self.digest), version, self.serial, self.base)

    @classmethod
    def unpack(cls, message: bytes) -> Opening | None:
        """None for another format: of this one nothing can be read from it."""
        wire_format, digest, version, serial, base = _LAYOUT.unpack(message)
        if wire_format != WIRE_FORMAT:
            return None
        return cls(digest.hex(), None if version == NO_VERSION else version, serial, base)


def misfit(opening: Opening | None, manifest: SyncManifest) -> str | None:
    """Why a receiver with `manifest` cannot take part; None where it can."""
    if opening is None:
        return f"the sender speaks another wire format than {WIRE_FORMAT}: run the same release everywhere"
    if opening.digest != manifest.digest():
        return (
            f"the sender's manifest is {opening.digest}, this receiver's {manifest.digest()}: learner and receiver "
            "do not agree on names, shapes, types or bucket size"
        )
    if manifest.version is not None and opening.version is not None and opening.version != manifest.version:
        return f"the sender publishes version {opening.version}, this receiver expects {manifest.version}"
    return None


def bucket_name(index: int, bucket: tuple[TensorSpec, ...]) -> str:
    """What errors call a bucket."""
    more = f" to {bucket[-1].name}" if len(bucket) > 1 else ""
    return f"bucket {index} ({bucket[0].name}{more})"
