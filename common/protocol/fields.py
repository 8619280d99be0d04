"""Encoding and checked decoding of the fields of a message. Decoded bytes come from a client and are not trusted."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, cast

import msgpack
import numpy as np

from common.protocol.schema import PROTOCOL_VERSION, Ids

MAX_ITEMS = 16_384
"""Upper bound for items per message, checked while the message is parsed, whatever a server's own limit is."""

MAX_FIELDS = 16
"""Upper bound for the keys of one map; no message of this protocol has more."""

MAX_TEXT = 4096
"""Upper bound for the bytes of one string, checked before the string is made."""

SHOWN_CHARACTERS = 100
"""Upper bound for the characters of a received value that an error repeats."""


class CodecError(ValueError):
    """Bytes that are not a message of this protocol version; the text names the fault and the field."""


class _Short(reprlib.Repr):
    """`reprlib` cuts strings and lists before it makes their text, and bytes only afterwards."""

    def repr_bytes(self, value: bytes, _: int) -> str:
        return repr(value[: self.maxstring])


def shown(value: object) -> str:
    """`value` as an error shows it: short, because a reply must not repeat a body of megabytes."""
    return _Short().repr(value)[:SHOWN_CHARACTERS]


def pack_ids(ids: Ids) -> dict[str, Any]:
    """Encode ids of any shape with 2 bytes per id, or 3 if the largest needs them. Raises CodecError from 2**24 on."""
    flat = np.ascontiguousarray(ids, dtype="<u4")
    largest = int(flat.max(initial=0))
    if largest < 1 << 16:
        return {"n": list(flat.shape), "w": 2, "b": _raw(flat.astype("<u2"))}
    if largest < 1 << 24:
        planes = flat.reshape(-1, 1).view(np.uint8)[:, :3]
        return {"n": list(flat.shape), "w": 3, "b": _raw(np.ascontiguousarray(planes))}
    raise CodecError(f"token id {largest} does not fit in 3 bytes")


def unpack_ids(value: object, field: str) -> Ids:
    """Decode what `pack_ids` made. Raises CodecError if shape, width and byte count disagree."""
    packed = map_field(value, field)
    shape, raw = _shape(packed, field), _bytes(packed, field)
    width = packed.get("w")
    if type(width) is not int or width not in (2, 3):
        raise CodecError(f"{field}.w: id width is {shown(width)}, must be 2 or 3")
    _check_size(shape, width, raw, field)
    if width == 2:
        return np.frombuffer(raw, dtype="<u2").astype(np.uint32).reshape(shape)
    wide = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
    wide[:, :3] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
    return wide.view("<u4").astype(np.uint32, copy=False).reshape(shape)


def pack_floats(values: np.ndarray[Any, Any], dtype: str) -> dict[str, Any]:
    """Encode floats of any shape as `dtype`."""
    return {"n": list(values.shape), "b": _raw(np.ascontiguousarray(values, dtype=dtype))}


def _raw(array: np.ndarray[Any, Any]) -> memoryview | bytes:
    """Return the bytes of a contiguous array without a copy."""
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def unpack_floats(value: object, dtype: str, field: str) -> np.ndarray[Any, Any]:
    """Decode what `pack_floats` made. Raises CodecError if shape and byte count disagree."""
    packed = map_field(value, field)
    shape, raw = _shape(packed, field), _bytes(packed, field)
    _check_size(shape, np.dtype(dtype).itemsize, raw, field)
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def dump_message(message: dict[str, Any]) -> bytes:
    """Serialise a message, with the protocol version first."""
    parts: list[bytes | memoryview] = []
    _emit({"v": PROTOCOL_VERSION, **message}, msgpack.Packer(use_bin_type=True), parts)
    return b"".join(parts)


def _emit(value: object, packer: Any, parts: list[bytes | memoryview]) -> None:
    """Append the msgpack form of `value` without copies of long bytes; `msgpack.packb` copies them twice more."""
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


def load_message(body: bytes) -> Mapping[str, Any]:
    """Parse a message within fixed limits and check its version. Raises CodecError."""
    try:
        message = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_FIELDS,
            max_ext_len=0,
            **_count_containers(),
        )
    except Exception as error:  # msgpack raises its own types, ValueError and TypeError
        raise CodecError(f"not a msgpack message: {str(error)[:SHOWN_CHARACTERS]}") from error
    fields = map_field(message, "the message")
    version = fields.get("v")
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise CodecError(f"protocol version is {shown(version)}, this side speaks {PROTOCOL_VERSION}")
    return fields


def _count_containers() -> dict[str, Any]:
    """Return hooks that refuse millions of tiny maps and lists: one byte each in the body, far more in memory."""
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


def map_field(value: object, field: str) -> Mapping[str, Any]:
    """Return `value` if it is a map."""
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
        raise CodecError(f"{field}.n: shape is {shown(shape)}, must be a list of one or two sizes")
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


def vector_field(message: Mapping[str, Any], key: str, field: str) -> Ids:
    """Decode one-dimensional ids; `field` is the path of `message`, for the error."""
    name = f"{field}.{key}" if field else key
    ids = unpack_ids(message.get(key), name)
    if ids.ndim != 1:
        raise CodecError(f"{name}: shape is {list(ids.shape)}, must be one-dimensional")
    return ids


def text_field(message: Mapping[str, Any], key: str) -> str:
    """Return a string."""
    value = message.get(key)
    if not isinstance(value, str):
        raise CodecError(f"{key}: expected a string, got {type(value).__name__}")
    return value


def hash_field(value: object, field: str) -> str:
    """Return `value` if it is the hex form of a sha256."""
    if not isinstance(value, str) or len(value) != 64 or any(c not in "0123456789abcdef" for c in value):
        raise CodecError(f"{field}: expected 64 lowercase hex digits")
    return value


def integer_field(message: Mapping[str, Any], key: str) -> int:
    """Return an integer; a boolean is none."""
    value = message.get(key)
    if type(value) is not int:
        raise CodecError(f"{key}: expected an integer, got {type(value).__name__}")
    return value


def number_field(message: Mapping[str, Any], key: str) -> float:
    """Return an integer or float as a float."""
    value = message.get(key)
    if type(value) not in (int, float):
        raise CodecError(f"{key}: expected a number, got {type(value).__name__}")
    return float(cast(float, value))
