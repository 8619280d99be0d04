"""Checksums of sent weights: 8 bytes, equal at both ends, computed on the device that holds the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import xxhash

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_BYTES = 8
WORDS_AT_A_TIME = 1 << 22
"""Words of a device checksum whose 64-bit products are in memory together."""
SPREAD = -0x61C8_8646_80B5_83EB
"""2**64 divided by the golden ratio, as a signed 64-bit number: successive multiples differ in most bits."""


def checksum(data: Tensor) -> bytes:
    """Checksum of a contiguous byte tensor: xxh3 in host memory, `mixed_sum` on a device."""
    if data.device.type == "cpu":
        return xxhash.xxh3_64_digest(cast(Any, data.numpy()))
    return mixed_sum(data)


def mixed_sum(data: Tensor) -> bytes:
    """Sum ``(word + 1) * key(position)`` over all 32-bit words, modulo 2**64, on the data's device.

    Keys are odd, so any single changed word changes the sum, and they differ by position, so swapped words do too.
    Like xxh3, it is no defence against an adversary.
    """
    import torch

    length = data.numel()
    padded = data if length % 4 == 0 else torch.nn.functional.pad(data, (0, -length % 4))
    words = padded.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(words), WORDS_AT_A_TIME):
        part = words[start : start + WORDS_AT_A_TIME].to(torch.int64)
        positions = torch.arange(start, start + len(part), dtype=torch.int64, device=data.device)
        keys = positions * SPREAD
        keys ^= keys >> 29
        total += ((part + 1) * (keys | 1)).sum()
    return int(total + length).to_bytes(CHECKSUM_BYTES, "little", signed=True)
