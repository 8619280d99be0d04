"""Delta of a bucket against the version before: in bfloat16 a small step leaves most weights unchanged.

The bucket is encoded in chunks of `CHUNK_ITEMS`. Each chunk is a header (form, number of values) and a body, in the
smallest of these forms:

==========  ===============================================================================
``SAME``    nothing
``GAPS``    distance from one changed item to the next, one byte each (less 1), then the values
``MASK``    one bit per item of the chunk, then the values of the set bits
``WHOLE``   all values
==========  ===============================================================================

Unchanged items bridge distances over 256. Values are compared and sent as bits, so NaN and -0.0 are preserved.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

CHUNK_ITEMS = 1 << 22
MAX_GAP = 256
SAME, GAPS, MASK, WHOLE = range(4)
HEADER = struct.Struct("<BI")

Bytes = NDArray[np.uint8]
Items = NDArray[np.unsignedinteger]


class DeltaError(ValueError):
    """A delta that does not fit the bucket it is applied to."""


def encode(base: Bytes, new: Bytes, item_bytes: int, limit: int | None = None) -> Bytes | None:
    """Encode the change from `base` to `new` (flat, equally long, items of 2 or 4 bytes).

    Returns None if the delta is not shorter than `limit` bytes, by default the length of `new`.
    """
    limit = new.nbytes if limit is None else limit
    parts: list[Bytes] = []
    size = 0
    for old_chunk, new_chunk in zip(_chunks(base, item_bytes), _chunks(new, item_bytes), strict=True):
        for part in _encode_chunk(old_chunk, new_chunk):
            parts.append(part)
            size += part.nbytes
        if size >= limit:
            return None
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def apply(base: Bytes, delta: Bytes, item_bytes: int) -> None:
    """Apply a delta of `encode` to `base` in place; after a DeltaError `base` is partly changed."""
    offset = 0

    def take(size: int) -> Bytes:
        nonlocal offset
        if offset + size > delta.nbytes:
            raise DeltaError(f"the delta has {delta.nbytes} bytes, its own headers need more")
        offset += size
        return delta[offset - size : offset]

    for chunk in _chunks(base, item_bytes):
        form, count = HEADER.unpack(take(HEADER.size).tobytes())
        selected: NDArray[np.integer] | NDArray[np.bool_] | slice
        if form == GAPS:
            selected = np.cumsum(take(count).astype(np.int64) + 1) - 1
            fits = not count or int(selected[-1]) < len(chunk)
        elif form == MASK:
            selected = np.unpackbits(take((len(chunk) + 7) // 8), count=len(chunk)).view(np.bool_)
            fits = int(np.count_nonzero(selected)) == count
        else:
            selected, fits = slice(None), (form, count) in ((SAME, 0), (WHOLE, len(chunk)))
        if not fits:
            raise DeltaError(f"the delta has a chunk of form {form} with {count} values for {len(chunk)} items")
        if count:
            chunk[selected] = np.frombuffer(take(count * item_bytes).tobytes(), chunk.dtype)
    if offset != delta.nbytes:
        raise DeltaError(f"the delta has {delta.nbytes} bytes, only {offset} were used")


def _chunks(data: Bytes, item_bytes: int) -> Iterator[Items]:
    items = data.view(np.dtype(f"u{item_bytes}"))
    for start in range(0, len(items), CHUNK_ITEMS):
        yield items[start : start + CHUNK_ITEMS]


def _encode_chunk(old: Items, new: Items) -> list[Bytes]:
    changed = old != new
    indices = np.flatnonzero(changed)
    if not len(indices):
        return [_header(SAME, 0)]
    bridged = _bridge_gaps(indices)
    item_bytes = new.dtype.itemsize
    sizes = {
        GAPS: len(bridged) * (1 + item_bytes),
        MASK: (len(new) + 7) // 8 + len(indices) * item_bytes,
        WHOLE: new.nbytes,
    }
    form = min(sizes, key=lambda form: sizes[form])
    if form == GAPS:
        gaps = (np.diff(bridged, prepend=-1) - 1).astype(np.uint8)
        return [_header(GAPS, len(bridged)), gaps, _as_bytes(new[bridged])]
    if form == MASK:
        return [_header(MASK, len(indices)), np.packbits(changed), _as_bytes(new[indices])]
    return [_header(WHOLE, len(new)), _as_bytes(new)]


def _bridge_gaps(indices: NDArray[np.intp]) -> NDArray[np.intp]:
    """Insert an index every `MAX_GAP` items between `indices` that are farther apart."""
    before = np.concatenate(([-1], indices[:-1]))
    hops = (indices - before - 1) // MAX_GAP + 1
    if int(hops.max()) == 1:
        return indices
    last = np.cumsum(hops)
    nth = np.arange(1, last[-1] + 1) - np.repeat(last - hops, hops)
    return np.minimum(np.repeat(before, hops) + nth * MAX_GAP, np.repeat(indices, hops))


def _header(form: int, count: int) -> Bytes:
    return np.frombuffer(HEADER.pack(form, count), np.uint8)


def _as_bytes(items: Items) -> Bytes:
    return np.ascontiguousarray(items).view(np.uint8)
