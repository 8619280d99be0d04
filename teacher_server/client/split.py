"""Large batches as several requests: pure, by the bytes that items take on the wire, there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from common.schema import ScoreItem, ScoreMode
from teacher_server.wire_size import reply_bytes, request_bytes

T = TypeVar("T")

REQUEST_BYTES = 8 * 1024 * 1024
"""Largest request or reply (about 10,000 tokens at k = 256), unless of a single item: small enough that one is computed
while the next travels, and that buffers are used again instead of being mapped anew."""


def requests(
    entries: Iterable[T],
    item: Callable[[T], ScoreItem],
    mode: ScoreMode,
    k: int,
    *,
    most_bytes: int,
    most_items: int | None = None,
) -> Iterator[list[T]]:
    """`entries` cut into requests of one context each, in order, none above a bound unless it is a single entry.

    One context, because a server of several replicas keeps each on one of them. `most_bytes` bounds the request and its
    reply, each.
    """
    by_context: dict[str | None, list[T]] = {}
    for entry in entries:
        by_context.setdefault(item(entry).context, []).append(entry)
    for alike in by_context.values():
        request: list[T] = []
        taken = 0
        for entry in alike:
            size = max(request_bytes(item(entry)), reply_bytes(item(entry), mode, k))
            if request and (taken + size > most_bytes or len(request) == most_items):
                yield request
                request, taken = [], 0
            request.append(entry)
            taken += size
        yield request
