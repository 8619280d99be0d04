"""Large batches as several requests: pure, by tokens and by the bytes that items take on the wire, there and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from common.protocol.schema import ScoreItem, ScoreMode, TeacherInfo
from teacher_server.backends.wire_size import own_tokens, reply_bytes, request_bytes

T = TypeVar("T")

REQUEST_BYTES = 8 * 1024 * 1024
"""Largest request or reply (about 10,000 tokens at k = 256), unless of a single item: small enough that one is computed
while the next travels, and that buffers are used again instead of being mapped anew."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one request; None: whatever the others allow."""

    most_bytes: int = REQUEST_BYTES
    """Of the request and of its reply, each."""
    most_items: int | None = None
    most_tokens: int | None = None
    """Of prompts and responses."""

    @classmethod
    def of(cls, info: TeacherInfo) -> Bounds:
        """What this server takes."""
        return cls(min(REQUEST_BYTES, info.max_body_bytes), info.max_items, info.max_request_tokens)


def requests(
    entries: Iterable[T], item: Callable[[T], ScoreItem], mode: ScoreMode, k: int, bounds: Bounds
) -> Iterator[list[T]]:
    """`entries` cut into requests of one context each, in order, none above a bound unless it is a single entry.

    One context, because a server of several replicas keeps each on one of them.
    """
    most_tokens = math.inf if bounds.most_tokens is None else bounds.most_tokens
    by_context: dict[str | None, list[T]] = {}
    for entry in entries:
        by_context.setdefault(item(entry).context, []).append(entry)
    for alike in by_context.values():
        request: list[T] = []
        taken = tokens = 0
        for entry in alike:
            size = max(request_bytes(item(entry)), reply_bytes(item(entry), mode, k))
            own = own_tokens(item(entry))
            full = taken + size > bounds.most_bytes or tokens + own > most_tokens or len(request) == bounds.most_items
            if request and full:
                yield request
                request, taken, tokens = [], 0, 0
            request.append(entry)
            taken += size
            tokens += own
        yield request
