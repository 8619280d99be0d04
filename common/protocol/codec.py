"""Binary form of the teacher's protocol: one msgpack map per message, arrays as raw little-endian bytes inside.

An id array is ``{"n": shape, "w": bytes per id (2 or 3), "b": bytes}``; a float array is ``{"n": shape, "b": bytes}``
with the element type fixed by the field (f16 for ``logprobs``, f32 otherwise). Every message starts with ``"v"``,
the protocol version. No pickle, no code, no compression; sizes are checked against the bytes that really came before
an array is made. ``docs/teacher-api.md`` shows the layout byte by byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import msgpack
import numpy as np

from common.protocol.schema import (
    PROTOCOL_VERSION,
    Context,
    Ids,
    ItemError,
    ItemScore,
    ScoreItem,
    ScoreMode,
    ScoreRequest,
    ScoreResponse,
)

MAX_ITEMS = 16_384
"""Items of one message; more are refused while it is being read, whatever a server's own limit is."""

MAX_FIELDS = 16
"""Keys of one map; no message of this protocol has more."""

MEDIA_TYPE = "application/vnd.opcd.v1+msgpack"


class CodecError(ValueError):
    """The bytes are not a message of this protocol version; the text says what is wrong and where."""


# --- arrays ---------------------------------------------------------------------------------------------------------


def pack_ids(ids: Ids) -> dict[str, Any]:
    """Ids of any shape, at the smallest width of 2 or 3 bytes that holds the largest (vocabularies under 2**24)."""
    flat = np.ascontiguousarray(ids, dtype="<u4")
    largest = int(flat.max(initial=0))
    if largest < 1 << 16:
        return {"n": list(flat.shape), "w": 2, "b": _raw(flat.astype("<u2"))}
    if largest < 1 << 24:
        planes = flat.reshape(-1, 1).view(np.uint8)[:, :3]
        return {"n": list(flat.shape), "w": 3, "b": _raw(np.ascontiguousarray(planes))}
    raise CodecError(f"token id {largest} does not fit in 3 bytes")


def unpack_ids(value: object, field: str) -> Ids:
    """Inverse of `pack_ids`; raises CodecError where shape, width and byte count disagree."""
    packed = _map(value, field)
    shape, raw = _shape(packed, field), _bytes(packed, field)
    width = packed.get("w")
    if width not in (2, 3):
        raise CodecError(f"{field}.w: id width is {width!r}, must be 2 or 3")
    _check_size(shape, width, raw, field)
    if width == 2:
        return np.frombuffer(raw, dtype="<u2").astype(np.uint32).reshape(shape)
    wide = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
    wide[:, :3] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
    return wide.view("<u4").astype(np.uint32, copy=False).reshape(shape)


def _pack_floats(values: np.ndarray[Any, Any], dtype: str) -> dict[str, Any]:
    return {"n": list(values.shape), "b": _raw(np.ascontiguousarray(values, dtype=dtype))}


def _raw(array: np.ndarray[Any, Any]) -> memoryview | bytes:
    """The bytes of a contiguous array, not copied: the packer does that."""
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def _unpack_floats(value: object, dtype: str, field: str) -> np.ndarray[Any, Any]:
    packed = _map(value, field)
    shape, raw = _shape(packed, field), _bytes(packed, field)
    _check_size(shape, np.dtype(dtype).itemsize, raw, field)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


# --- messages -------------------------------------------------------------------------------------------------------


def encode_context(context: Context, *, parent_tokens: int = 0) -> bytes:
    """Body of ``PUT /v1/contexts/{hash}``; the first `parent_tokens` ids stay behind, the parent has them."""
    return _dump({"parent": context.parent, "ids": pack_ids(context.ids[parent_tokens:])})


def decode_context(body: bytes) -> tuple[str | None, Ids]:
    """(parent hash or None, ids after the parent's)."""
    message = _load(body)
    parent = message.get("parent")
    return (None if parent is None else _hash(parent, "parent")), _vector(message, "ids", "")


def encode_request(request: ScoreRequest) -> bytes:
    """Body of ``POST /v1/score``."""
    return _dump(
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
    """Inverse of `encode_request`; raises CodecError with the place of the fault."""
    message = _load(body)
    mode = message.get("mode")
    if mode not in get_args(ScoreMode):
        raise CodecError(f"mode is {mode!r}, must be one of {', '.join(get_args(ScoreMode))}")
    items = message.get("items")
    if not isinstance(items, list):
        raise CodecError("items: missing or not a list")
    return ScoreRequest(
        request_id=_text(message, "id"),
        run=_text(message, "run"),
        mode=cast(ScoreMode, mode),
        temperature=_number(message, "temperature"),
        k=_integer(message, "k"),
        items=tuple(_decode_item(item, f"items[{i}]") for i, item in enumerate(items)),
    )


def _decode_item(value: object, field: str) -> ScoreItem:
    item = _map(value, field)
    context, topk = item.get("context"), item.get("topk")
    return ScoreItem(
        context=None if context is None else _hash(context, f"{field}.context"),
        prompt_ids=_vector(item, "prompt", field),
        response_ids=_vector(item, "response", field),
        topk_ids=None if topk is None else unpack_ids(topk, f"{field}.topk"),
    )


def encode_response(response: ScoreResponse) -> bytes:
    """Reply to ``POST /v1/score``."""
    return _dump(
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
        "logprobs": _pack_floats(result.logprobs, "<f2"),
        "sampled": _pack_floats(result.sampled_logprob, "<f4"),
        "tail": _pack_floats(result.tail_logprob, "<f4"),
        "topk": None if result.topk_ids is None else pack_ids(result.topk_ids),
        "floored": result.floored,
    }


def decode_response(body: bytes) -> ScoreResponse:
    """Inverse of `encode_response`."""
    message = _load(body)
    results = message.get("results")
    if not isinstance(results, list):
        raise CodecError("results: missing or not a list")
    return ScoreResponse(
        request_id=_text(message, "id"),
        model_fingerprint=_text(message, "model"),
        weight_version=_integer(message, "version"),
        results=tuple(_decode_result(result, f"results[{i}]") for i, result in enumerate(results)),
    )


def _decode_result(value: object, field: str) -> ItemScore | ItemError:
    result = _map(value, field)
    if "error" in result:
        return ItemError(code=cast(Any, _text(result, "error")), message=_text(result, "message"))
    topk = result.get("topk")
    return ItemScore(
        logprobs=_unpack_floats(result.get("logprobs"), "<f2", f"{field}.logprobs"),
        sampled_logprob=_unpack_floats(result.get("sampled"), "<f4", f"{field}.sampled"),
        tail_logprob=_unpack_floats(result.get("tail"), "<f4", f"{field}.tail"),
        topk_ids=None if topk is None else unpack_ids(topk, f"{field}.topk"),
        floored=_integer(result, "floored"),
    )


# --- checked access -------------------------------------------------------------------------------------------------


def _dump(message: dict[str, Any]) -> bytes:
    parts: list[bytes | memoryview] = []
    _emit({"v": PROTOCOL_VERSION, **message}, msgpack.Packer(use_bin_type=True), parts)
    return b"".join(parts)


def _emit(value: object, packer: Any, parts: list[bytes | memoryview]) -> None:
    """Append the msgpack form of `value`, long bytes as they are: `msgpack.packb` would copy them twice more."""
    if isinstance(value, dict):
        parts.append(packer.pack_map_header(len(value)))
        for key, inner in value.items():
            parts.append(packer.pack(key))
            _emit(inner, packer, parts)
    elif isinstance(value, list):
        parts.append(packer.pack_array_header(len(value)))
        for inner in value:
            _emit(inner, packer, parts)
    elif isinstance(value, bytes | memoryview):
        size = len(value)
        parts.append(
            b"\xc4" + size.to_bytes(1)
            if size < 1 << 8
            else b"\xc5" + size.to_bytes(2)
            if size < 1 << 16
            else b"\xc6" + size.to_bytes(4)
        )
        parts.append(value)
    else:
        parts.append(packer.pack(value))


def _load(body: bytes) -> Mapping[str, Any]:
    try:
        message = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_FIELDS,
            max_ext_len=0,
            **_count_containers(),
        )
    except Exception as error:  # msgpack raises its own types beside ValueError and TypeError
        raise CodecError(f"not a msgpack message: {error}") from error
    fields = _map(message, "the message")
    if fields.get("v") != PROTOCOL_VERSION:
        raise CodecError(f"protocol version is {fields.get('v')!r}, this side speaks {PROTOCOL_VERSION}")
    return fields


def _count_containers() -> dict[str, Any]:
    """Hooks that stop a body of millions of tiny maps and lists, each of which costs far more memory than its byte."""
    left, long_lists = 8 * MAX_ITEMS, 1

    def count_map(value: dict[str, Any]) -> dict[str, Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("more maps and lists than any message has")
        return value

    def count_list(value: list[Any]) -> list[Any]:
        nonlocal left, long_lists
        left -= 1
        long_lists -= len(value) > 2
        if left < 0 or long_lists < 0:
            raise ValueError("more maps and lists than any message has")
        return value

    return {"object_hook": count_map, "list_hook": count_list}


def _map(value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CodecError(f"{field}: expected a map, got {type(value).__name__}")
    return value


def _shape(packed: Mapping[str, Any], field: str) -> tuple[int, ...]:
    shape = packed.get("n")
    if (
        not isinstance(shape, list)
        or len(shape) not in (1, 2)
        or any(type(n) is not int or not 0 <= n < 1 << 31 for n in shape)
    ):
        raise CodecError(f"{field}.n: shape is {shape!r}, must be a list of one or two sizes")
    return tuple(shape)


def _bytes(packed: Mapping[str, Any], field: str) -> bytes | memoryview:
    raw = packed.get("b")
    if not isinstance(raw, bytes | memoryview):
        raise CodecError(f"{field}.b: expected bytes, got {type(raw).__name__}")
    return raw


def _check_size(shape: tuple[int, ...], width: int, raw: bytes | memoryview, field: str) -> None:
    expected = width
    for n in shape:
        expected *= n
    if len(raw) != expected:
        raise CodecError(f"{field}: shape {list(shape)} at {width} bytes needs {expected} bytes, {len(raw)} came")


def _vector(message: Mapping[str, Any], key: str, field: str) -> Ids:
    name = f"{field}.{key}" if field else key
    ids = unpack_ids(message.get(key), name)
    if ids.ndim != 1:
        raise CodecError(f"{name}: shape is {list(ids.shape)}, must be one-dimensional")
    return ids


def _text(message: Mapping[str, Any], key: str) -> str:
    value = message.get(key)
    if not isinstance(value, str) or len(value) > 4096:
        raise CodecError(f"{key}: expected a string of at most 4096 characters, got {type(value).__name__}")
    return value


def _hash(value: object, field: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or any(c not in "0123456789abcdef" for c in value):
        raise CodecError(f"{field}: expected 64 lowercase hex digits")
    return value


def _integer(message: Mapping[str, Any], key: str) -> int:
    value = message.get(key)
    if type(value) is not int:
        raise CodecError(f"{key}: expected an integer, got {type(value).__name__}")
    return value


def _number(message: Mapping[str, Any], key: str) -> float:
    value = message.get(key)
    if type(value) not in (int, float):
        raise CodecError(f"{key}: expected a number, got {type(value).__name__}")
    return float(cast(float, value))
