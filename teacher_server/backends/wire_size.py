"""Sizes of an item in tokens and in bytes on the wire, by which client and server bound requests."""

from __future__ import annotations

from common.protocol.schema import ScoreItem, ScoreMode

FIELDS_BYTES = 256
"""Upper bound for names, shapes and the context's hash of one item."""


MIN_ITEM_TOKENS = 16
"""Tokens that an item counts at least: what its checks, bookkeeping and reply cost on the tiniest model."""


def own_tokens(item: ScoreItem) -> int:
    """Tokens of prompt and response; the context costs no forward pass."""
    return int(item.prompt_ids.size + item.response_ids.size)


def queue_tokens(item: ScoreItem) -> int:
    """Tokens that an item counts in the queue: a tiny item costs the server more than its tokens."""
    return max(MIN_ITEM_TOKENS, own_tokens(item))


def request_bytes(item: ScoreItem) -> int:
    """Upper bound of an item's bytes in a request."""
    support = 0 if item.topk_ids is None else int(item.topk_ids.size)
    return FIELDS_BYTES + 3 * (own_tokens(item) + support)


def reply_bytes(item: ScoreItem, mode: ScoreMode, k: int) -> int:
    """Upper bound of the bytes of an item's score. It holds the teacher's ids, so it can far exceed the request."""
    tokens = int(item.response_ids.size)
    requested = int(item.topk_ids.size) if item.topk_ids is not None and mode in ("at_ids", "union") else 0
    picks = mode in ("teacher_topk", "union")
    width_bytes = 2 + 3 if picks else 2  # f16 values, and ids if the teacher picks any
    return FIELDS_BYTES + 8 * tokens + width_bytes * (requested + (tokens * k if picks else 0))
