"""Checks before an item is queued: of whole requests (RequestRefused) and of single items (ItemError)."""

from __future__ import annotations

import math

from common.protocol.schema import Context, ItemError, ScoreItem, ScoreRequest, TeacherInfo
from teacher_server.backends.base import Backend
from teacher_server.backends.wire_size import MIN_ITEM_TOKENS, queue_tokens, reply_bytes

MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-3


class RequestRefused(ValueError):
    """The whole request is refused. `status` is the HTTP status, `code` is machine-readable."""

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after_s = status, code, retry_after_s


def check_request(request: ScoreRequest, info: TeacherInfo) -> int:
    """Check mode, temperature, k, number of items, tokens and size of the reply. Raises RequestRefused.

    Returns an upper bound for the bytes of the reply.
    """
    if request.mode not in info.modes:
        raise RequestRefused(
            400, "mode", f"mode {request.mode} is not offered by this teacher ({', '.join(info.modes)} are)"
        )
    allowed = info.modes[request.mode]
    if not math.isfinite(request.temperature) or not MIN_TEMPERATURE <= request.temperature <= MAX_TEMPERATURE:
        raise RequestRefused(
            400, "temperature", f"temperature {request.temperature} is outside {MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
        )
    if allowed is not None and request.temperature not in allowed:
        raise RequestRefused(400, "temperature", f"mode {request.mode} is offered at temperatures {list(allowed)} only")
    min_k = 1 if request.mode in ("teacher_topk", "union") else 0
    if not min_k <= request.k <= min(info.max_k, info.vocab_size):
        raise RequestRefused(
            400, "k", f"k is {request.k}, must be {min_k} to {min(info.max_k, info.vocab_size)} in mode {request.mode}"
        )
    if len(request.items) > info.max_items:
        raise RequestRefused(413, "items", f"{len(request.items)} items, at most {info.max_items} in one request")
    tokens = sum(map(queue_tokens, request.items))
    if len(request.items) > 1 and tokens > info.max_request_tokens:
        raise RequestRefused(
            413,
            "tokens",
            f"{len(request.items)} items have {tokens} prompt and response tokens (an item counts as at least "
            f"{MIN_ITEM_TOKENS}), at most {info.max_request_tokens} in one request of several items: send fewer items",
        )
    reply = sum(reply_bytes(item, request.mode, request.k) for item in request.items)
    if reply > info.max_body_bytes:
        raise RequestRefused(
            413,
            "reply",
            f"the scores of {len(request.items)} items would take {reply} bytes, at most {info.max_body_bytes}: "
            "send fewer at a time, or a smaller k",
        )
    if not 0 < len(request.run) <= 128 or not request.run.isprintable():
        raise RequestRefused(400, "run", "the run's name must have 1 to 128 printable characters")
    return reply


def check_item(
    item: ScoreItem, context: Context | None, request: ScoreRequest, info: TeacherInfo, backend: Backend
) -> ItemError | None:
    """Check shapes, ids and lengths of one item under its stored `context`; None if the item is valid."""
    tokens = int(item.response_ids.size)
    wants_ids = request.mode in ("at_ids", "union")
    if wants_ids != (item.topk_ids is not None):
        need = "needs" if wants_ids else "takes no"
        return ItemError("bad_shape", f"mode {request.mode} {need} topk ids")
    if item.topk_ids is not None:
        shape = item.topk_ids.shape
        fewest = 1 if tokens else 0
        if len(shape) != 2 or shape[0] != tokens or not fewest <= shape[1] <= info.max_k:
            return ItemError(
                "bad_shape",
                f"topk ids of {tokens} response tokens have shape {list(shape)}, must be "
                f"[{tokens}, {fewest} to {info.max_k}]",
            )
    context_tokens = 0 if context is None else int(context.ids.size)
    total = context_tokens + int(item.prompt_ids.size) + tokens
    if total > info.max_sequence_tokens:
        return ItemError(
            "too_long",
            f"{context_tokens} context + {item.prompt_ids.size} prompt + {tokens} response tokens are {total}, "
            f"at most {info.max_sequence_tokens}",
        )
    if tokens and not context_tokens and not item.prompt_ids.size:
        return ItemError(
            "bad_shape", "prompt and context are both empty: the first response token needs a token before it"
        )
    if not backend.embeds(item.prompt_ids) or not backend.embeds(item.response_ids):
        largest = max(int(item.prompt_ids.max(initial=0)), int(item.response_ids.max(initial=0)))
        return ItemError("bad_ids", f"token id {largest} is not in this model's vocabulary of {info.vocab_size}")
    return None
