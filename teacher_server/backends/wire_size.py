"""How large an item is, in tokens and in bytes before it is there: what both sides cut and refuse requests by. Pure."""

from __future__ import annotations

from common.protocol.schema import ScoreItem, ScoreMode

FIELDS_BYTES = 256
"""Names, shapes and the context's hash of one item, at most."""


def own_tokens(item: ScoreItem) -> int:
    """Tokens of an item that a forward pass pays for: prompt and response, the context not."""
    return int(item.prompt_ids.size + item.response_ids.size)


def request_bytes(item: ScoreItem) -> int:
    """Bytes of an item in a request, at most."""
    support = 0 if item.topk_ids is None else int(item.topk_ids.size)
    return FIELDS_BYTES + 3 * (own_tokens(item) + support)


def reply_bytes(item: ScoreItem, mode: ScoreMode, k: int) -> int:
    """Bytes of an item's score, at most. A request of a few bytes may ask for many: the teacher's own ids are in it."""
    tokens = int(item.response_ids.size)
    asked = int(item.topk_ids.size) if item.topk_ids is not None and mode in ("at_ids", "union") else 0
    picks = mode in ("teacher_topk", "union")
    width_bytes = 2 + 3 if picks else 2  # f16 values, ids where the teacher has a part in choosing them
    return FIELDS_BYTES + 8 * tokens + width_bytes * (asked + (tokens * k if picks else 0))
