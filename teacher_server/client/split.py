"""Large batches as several requests: pure, by the bytes that items take on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from common.schema import ScoreItem

T = TypeVar("T")

REQUEST_BYTES = 8 * 1024 * 1024
"""Largest request (about 10,000 tokens at k = 256), unless a single item is larger: small enough that one is computed
while the next travels, and that buffers are used again instead of being mapped anew."""


def wire_bytes(item: ScoreItem) -> int:
    """Bytes of an item in a request, at most."""
    support = 0 if item.topk_ids is None else item.topk_ids.size
    return 256 + 3 * int(item.prompt_ids.size + item.response_ids.size + support)


def requests(
    entries: Iterable[T], item: Callable[[T], ScoreItem], *, most_bytes: int, most_items: int | None = None
) -> Iterator[list[T]]:
    """`entries` cut into requests of one context each, in order, none above a bound unless it is a single entry.

    One context, because a server of several replicas keeps each on one of them.
    """
    by_context: dict[str | None, list[T]] = {}
    for entry in entries:
        by_context.setdefault(item(entry).context, []).append(entry)
    for alike in by_context.values():
        request: list[T] = []
        taken = 0
        for entry in alike:
            size = wire_bytes(item(entry))
            if request and (taken + size > most_bytes or len(request) == most_items):
                yield request
                request, taken = [], 0
            request.append(entry)
            taken += size
        yield request
