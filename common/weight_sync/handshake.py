"""Handshake of a weight sync: every member compares the plan before any weights are sent."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common.weight_sync.manifest import SyncManifest, TensorSpec

PROTOCOL = 1
_LAYOUT = struct.Struct("<I32sqQQ")
HANDSHAKE_BYTES = _LAYOUT.size

REFUSED, WHOLE, DELTA = range(3)
"""A receiver's reply; the lowest one of all receivers decides. REFUSED: it has another plan. WHOLE: it takes whole
buckets. DELTA: it also holds the sender's `base` and takes deltas."""

NO_VERSION = -1


@dataclass(frozen=True, slots=True)
class Handshake:
    """The sender's announcement of one sync.

    `serial` counts the sender's syncs in this group from 1. `base` is the serial that deltas build on; 0: no deltas.
    """

    digest: str
    version: int | None
    serial: int
    base: int

    def encode(self) -> bytes:
        """Encode as ``HANDSHAKE_BYTES`` bytes."""
        version = NO_VERSION if self.version is None else self.version
        return _LAYOUT.pack(PROTOCOL, bytes.fromhex(self.digest), version, self.serial, self.base)

    @classmethod
    def decode(cls, message: bytes) -> Handshake | None:
        """Decode a message of `encode`; None for another protocol, whose fields cannot be read."""
        protocol, digest, version, serial, base = _LAYOUT.unpack(message)
        if protocol != PROTOCOL:
            return None
        return cls(digest.hex(), None if version == NO_VERSION else version, serial, base)


def refusal(handshake: Handshake | None, manifest: SyncManifest) -> str | None:
    """Explain why a receiver with `manifest` refuses the sync; None if it accepts."""
    if handshake is None:
        return f"the sender speaks another protocol than {PROTOCOL}: run the same release everywhere"
    if handshake.digest != manifest.digest():
        return (
            f"the sender's manifest is {handshake.digest}, this receiver's {manifest.digest()}: learner and receiver "
            "do not agree on names, shapes, types or bucket size"
        )
    if manifest.version is not None and handshake.version is not None and handshake.version != manifest.version:
        return f"the sender publishes version {handshake.version}, this receiver expects {manifest.version}"
    return None


def bucket_label(index: int, bucket: tuple[TensorSpec, ...]) -> str:
    """Name a bucket in error messages."""
    last = f" to {bucket[-1].name}" if len(bucket) > 1 else ""
    return f"bucket {index} ({bucket[0].name}{last})"
