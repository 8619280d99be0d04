"""A bucket of weights as what changed since the last one: in bfloat16 a small step leaves most weights as they were.

The bucket is taken in pieces of `PIECE_ITEMS`. Each piece is a head (form, number of values) and a body, in the form
that is smallest for it:

==========  ==============================================================================
``SAME``    nothing
``STEPS``   distance from one changed item to the next, a byte each (less 1), then the values
``MASK``    a bit for each item of the piece, then the values of those that are set
``WHOLE``   all values
==========  ==============================================================================

Distances over 256 are bridged by items that did not change. Values are compared and sent as bits: NaN and -0.0 are
what they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PIECE_ITEMS = 1 << 22
FARTHEST = 256
SAME, STEPS, MASK, WHOLE = range(4)
HEAD = struct.Struct("<BI")

Bytes = NDArray[np.uint8]
Items = NDArray[np.unsignedinteger]


class DeltaError(ValueError):
    """A delta that does not fit what it should be applied to."""


def encode(base: Bytes, new: Bytes, item_bytes: int, limit: int | None = None) -> Bytes | None:
    """What turns `base` into `new` (flat, equally long, items of 2 or 4 bytes); None where that is not shorter than
    `limit` bytes, by default those of `new` itself.
    """
    limit = new.nbytes if limit is None else limit
    parts: list[Bytes] = []
    size = 0
    for old, now in zip(_pieces(base, item_bytes), _pieces(new, item_bytes), strict=True):
        for part in _encode_piece(old, now):
            parts.append(part)
            size += part.nbytes
        if size >= limit:
            return None
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def apply(base: Bytes, delta: Bytes, item_bytes: int) -> None:
    """Turn `base` into what `encode` saw as new, in place; DeltaError leaves it in pieces."""
    offset = 0

    def take(size: int) -> Bytes:
        nonlocal offset
        if offset + size > delta.nbytes:
            raise DeltaError(f"the delta ends after {delta.nbytes} bytes, its own heads say more")
        offset += size
        return delta[offset - size : offset]

    for piece in _pieces(base, item_bytes):
        form, count = HEAD.unpack(take(HEAD.size).tobytes())
        where: NDArray[np.integer] | NDArray[np.bool_] | slice
        if form == STEPS:
            where = np.cumsum(take(count).astype(np.int64) + 1) - 1
            fits = not count or int(where[-1]) < len(piece)
        elif form == MASK:
            where = np.unpackbits(take((len(piece) + 7) // 8), count=len(piece)).view(np.bool_)
            fits = int(np.count_nonzero(where)) == count
        else:
            where, fits = slice(None), (form, count) in ((SAME, 0), (WHOLE, len(piece)))
        if not fits:
            raise DeltaError(f"the delta has a piece of form {form} with {count} values for {len(piece)} items")
        if count:
            piece[where] = np.frombuffer(take(count * item_bytes).tobytes(), piece.dtype)
    if offset != delta.nbytes:
        raise DeltaError(f"the delta has {delta.nbytes} bytes, {offset} were used")


def _pieces(data: Bytes, item_bytes: int) -> Iterator[Items]:
    items = data.view(np.dtype(f"u{item_bytes}"))
    for start in range(0, len(items), PIECE_ITEMS):
        yield items[start : start + PIECE_ITEMS]


def _encode_piece(old: Items, new: Items) -> list[Bytes]:
    changed = old != new
    places = np.flatnonzero(changed)
    if not len(places):
        return [_head(SAME, 0)]
    stops = _bridged(places)
    item_bytes = new.dtype.itemsize
    sizes = {
        STEPS: len(stops) * (1 + item_bytes),
        MASK: (len(new) + 7) // 8 + len(places) * item_bytes,
        WHOLE: new.nbytes,
    }
    form = min(sizes, key=lambda form: sizes[form])
    if form == STEPS:
        steps = (np.diff(stops, prepend=-1) - 1).astype(np.uint8)
        return [_head(STEPS, len(stops)), steps, _bytes(new[stops])]
    if form == MASK:
        return [_head(MASK, len(places)), np.packbits(changed), _bytes(new[places])]
    return [_head(WHOLE, len(new)), _bytes(new)]


def _bridged(places: NDArray[np.intp]) -> NDArray[np.intp]:
    """`places` and, between those that are too far apart, stops every `FARTHEST` items."""
    before = np.concatenate(([-1], places[:-1]))
    hops = (places - before - 1) // FARTHEST + 1
    if int(hops.max()) == 1:
        return places
    last = np.cumsum(hops)
    nth = np.arange(1, last[-1] + 1) - np.repeat(last - hops, hops)
    return np.minimum(np.repeat(before, hops) + nth * FARTHEST, np.repeat(places, hops))


def _head(form: int, count: int) -> Bytes:
    return np.frombuffer(HEAD.pack(form, count), np.uint8)


def _bytes(items: Items) -> Bytes:
    return np.ascontiguousarray(items).view(np.uint8)
