"""Binary form of the teacher's protocol: one msgpack map per message, arrays as raw little-endian bytes inside.

An id array is ``{"n": shape, "w": bytes per id (2 or 3), "b": bytes}``. A float array is ``{"n": shape, "b": bytes}``;
its field fixes the element type (f16 for ``logprobs``, f32 otherwise). Every message starts with ``"v"``, the protocol
version. There is no pickle, no code and no compression, and sizes are checked against the received bytes before an
array is made. ``docs/teacher-api.md`` shows the layout byte by byte.
"""

from __future__ import annotations

from typing import Any, cast, get_args

from common.protocol.fields import (
    CodecError,
    dump_message,
    hash_field,
    integer_field,
    load_message,
    map_field,
    number_field,
    pack_floats,
    pack_ids,
    shown,
    text_field,
    unpack_floats,
    unpack_ids,
    vector_field,
)
from common.protocol.schema import Context, Ids, ItemError, ItemScore, ScoreItem, ScoreMode, ScoreRequest, ScoreResponse

__all__ = [
    "MEDIA_TYPE",
    "CodecError",
    "decode_context",
    "decode_request",
    "decode_response",
    "encode_context",
    "encode_request",
    "encode_response",
]

MEDIA_TYPE = "application/vnd.opcd.v1+msgpack"


def encode_context(context: Context, *, parent_tokens: int = 0) -> bytes:
    """Encode the body of ``PUT /v1/contexts/{hash}`` without the first `parent_tokens` ids, which the parent holds."""
    return dump_message({"parent": context.parent, "ids": pack_ids(context.ids[parent_tokens:])})


def decode_context(body: bytes) -> tuple[str | None, Ids]:
    """Return (parent hash or None, ids after the parent's). Raises CodecError."""
    message = load_message(body)
    parent = message.get("parent")
    return (None if parent is None else hash_field(parent, "parent")), vector_field(message, "ids", "")


def encode_request(request: ScoreRequest) -> bytes:
    """Encode the body of ``POST /v1/score``."""
    return dump_message(
        {
            "id": request.request_id,
            "run": request.run,
            "mode": request.mode,
            "temperature": request.temperature,
            "k": request.k,
            "items": [
                {
                    "context": item.context,
                    "prompt": pack_ids(item.prompt_ids),
                    "response": pack_ids(item.response_ids),
                    "topk": None if item.topk_ids is None else pack_ids(item.topk_ids),
                }
                for item in request.items
            ],
        }
    )


def decode_request(body: bytes) -> ScoreRequest:
    """Decode what `encode_request` made. Raises CodecError with the faulty field."""
    message = load_message(body)
    mode = message.get("mode")
    if not isinstance(mode, str) or mode not in get_args(ScoreMode):
        raise CodecError(f"mode is {shown(mode)}, must be one of {', '.join(get_args(ScoreMode))}")
    items = message.get("items")
    if not isinstance(items, list):
        raise CodecError("items: missing or not a list")
    return ScoreRequest(
        request_id=text_field(message, "id"),
        run=text_field(message, "run"),
        mode=cast(ScoreMode, mode),
        temperature=number_field(message, "temperature"),
        k=integer_field(message, "k"),
        items=tuple(_decode_item(item, f"items[{i}]") for i, item in enumerate(items)),
    )


def _decode_item(value: object, field: str) -> ScoreItem:
    item = map_field(value, field)
    context, topk = item.get("context"), item.get("topk")
    return ScoreItem(
        context=None if context is None else hash_field(context, f"{field}.context"),
        prompt_ids=vector_field(item, "prompt", field),
        response_ids=vector_field(item, "response", field),
        topk_ids=None if topk is None else unpack_ids(topk, f"{field}.topk"),
    )


def encode_response(response: ScoreResponse) -> bytes:
    """Encode the reply to ``POST /v1/score``."""
    return dump_message(
        {
            "id": response.request_id,
            "model": response.model_fingerprint,
            "version": response.weight_version,
            "results": [_encode_result(result) for result in response.results],
        }
    )


def _encode_result(result: ItemScore | ItemError) -> dict[str, Any]:
    if isinstance(result, ItemError):
        return {"error": result.code, "message": result.message}
    return {
        "logprobs": pack_floats(result.logprobs, "<f2"),
        "sampled": pack_floats(result.sampled_logprob, "<f4"),
        "tail": pack_floats(result.tail_logprob, "<f4"),
        "topk": None if result.topk_ids is None else pack_ids(result.topk_ids),
        "floored": result.floored,
    }


def decode_response(body: bytes) -> ScoreResponse:
    """Decode what `encode_response` made. Raises CodecError with the faulty field."""
    message = load_message(body)
    results = message.get("results")
    if not isinstance(results, list):
        raise CodecError("results: missing or not a list")
    return ScoreResponse(
        request_id=text_field(message, "id"),
        model_fingerprint=text_field(message, "model"),
        weight_version=integer_field(message, "version"),
        results=tuple(_decode_result(result, f"results[{i}]") for i, result in enumerate(results)),
    )


def _decode_result(value: object, field: str) -> ItemScore | ItemError:
    result = map_field(value, field)
    if "error" in result:
        return ItemError(code=cast(Any, text_field(result, "error")), message=text_field(result, "message"))
    topk = result.get("topk")
    return ItemScore(
        logprobs=unpack_floats(result.get("logprobs"), "<f2", f"{field}.logprobs"),
        sampled_logprob=unpack_floats(result.get("sampled"), "<f4", f"{field}.sampled"),
        tail_logprob=unpack_floats(result.get("tail"), "<f4", f"{field}.tail"),
        topk_ids=None if topk is None else unpack_ids(topk, f"{field}.topk"),
        floored=integer_field(result, "floored"),
    )
