"""Splits batches into requests by items, tokens and bytes on the wire in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from common.protocol.schema import ScoreItem, ScoreMode, TeacherInfo
from teacher_server.backends.wire_size import queue_tokens, reply_bytes, request_bytes

T = TypeVar("T")

REQUEST_BYTES = 8 * 1024 * 1024
"""Maximum bytes of a request or reply of several items, about 10,000 tokens at k = 256. At this size the server
computes one request while the next travels, and reuses buffers instead of mapping new ones."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request; None is no limit."""

    max_bytes: int = REQUEST_BYTES
    """Bytes of the request, and of its reply."""
    max_items: int | None = None
    max_tokens: int | None = None
    """Tokens of prompts and responses; a short item counts as `wire_size.MIN_ITEM_TOKENS`."""

    @classmethod
    def of(cls, info: TeacherInfo) -> RequestLimits:
        """Limits of the server that sent `info`."""
        return cls(min(REQUEST_BYTES, info.max_body_bytes), info.max_items, info.max_request_tokens)


def split_requests(
    entries: Iterable[T], item: Callable[[T], ScoreItem], mode: ScoreMode, k: int, limits: RequestLimits
) -> Iterator[list[T]]:
    """Split `entries` into requests of one context each, in order. Only a request of one entry may exceed a limit.

    One context, because a server of several replicas keeps each context on one replica.
    """
    max_tokens = math.inf if limits.max_tokens is None else limits.max_tokens
    by_context: dict[str | None, list[T]] = {}
    for entry in entries:
        by_context.setdefault(item(entry).context, []).append(entry)
    for same_context in by_context.values():
        request: list[T] = []
        total_bytes = total_tokens = 0
        for entry in same_context:
            size = max(request_bytes(item(entry)), reply_bytes(item(entry), mode, k))
            tokens = queue_tokens(item(entry))
            full = (
                total_bytes + size > limits.max_bytes
                or total_tokens + tokens > max_tokens
                or len(request) == limits.max_items
            )
            if request and full:
                yield request
                request, total_bytes, total_tokens = [], 0, 0
            request.append(entry)
            total_bytes += size
            total_tokens += tokens
        yield request
