"""The wire form: decoding returns the encoded values, and any other bytes raise CodecError and nothing else."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.protocol.codec import (
    CodecError,
    decode_context,
    decode_request,
    decode_response,
    encode_context,
    encode_request,
    encode_response,
)
from common.protocol.fields import pack_ids, unpack_ids
from common.protocol.schema import Context, ItemError, ItemScore, ScoreItem, ScoreRequest, ScoreResponse, as_ids

DECODERS = (decode_context, decode_request, decode_response)

names = st.text(max_size=20)
hashes = st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)
ids_up_to = st.sampled_from([255, 0xFFFF, 0x10000, 0xFFFFFF])


def id_arrays(*, shape: Any) -> st.SearchStrategy[Any]:
    return ids_up_to.flatmap(lambda top: hnp.arrays(np.uint32, shape, elements=st.integers(0, top)))


@st.composite
def items(draw: st.DrawFn) -> ScoreItem:
    tokens, k = draw(st.integers(0, 6)), draw(st.integers(0, 5))
    return ScoreItem(
        context=draw(hashes),
        prompt_ids=draw(id_arrays(shape=draw(st.integers(0, 5)))),
        response_ids=draw(id_arrays(shape=tokens)),
        topk_ids=draw(st.none() | id_arrays(shape=(tokens, k))),
    )


requests = st.builds(
    ScoreRequest,
    request_id=names,
    run=names,
    mode=st.sampled_from(["at_ids", "teacher_topk", "union", "sampled"]),
    temperature=st.floats(allow_nan=False),
    k=st.integers(0, 1024),
    items=st.lists(items(), max_size=5).map(tuple),
)


@st.composite
def scores(draw: st.DrawFn) -> ItemScore:
    tokens, k = draw(st.integers(0, 6)), draw(st.integers(0, 5))
    return ItemScore(
        logprobs=draw(hnp.arrays(np.float16, (tokens, k))),
        sampled_logprob=draw(hnp.arrays(np.float32, tokens)),
        tail_logprob=draw(hnp.arrays(np.float32, tokens)),
        topk_ids=draw(st.none() | id_arrays(shape=(tokens, k))),
        floored=draw(st.integers(0, 100)),
    )


responses = st.builds(
    ScoreResponse,
    request_id=names,
    model_fingerprint=names,
    weight_version=st.integers(0, 2**40),
    results=st.lists(scores() | st.builds(ItemError, st.sampled_from(["too_long", "internal"]), names), max_size=5).map(
        tuple
    ),
)


def assert_same(left: Any, right: Any) -> None:
    """Equal fields and types, arrays bit by bit, NaNs included."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif hasattr(left, "__dataclass_fields__"):
        for name in left.__dataclass_fields__:
            assert_same(getattr(left, name), getattr(right, name))
    else:
        assert left == right


@given(requests)
def test_request_roundtrip(request_: ScoreRequest) -> None:
    assert_same(decode_request(encode_request(request_)), request_)


@given(responses)
def test_response_roundtrip(response: ScoreResponse) -> None:
    assert_same(decode_response(encode_response(response)), response)


@given(id_arrays(shape=st.integers(1, 9)), hashes, st.integers(0, 9))
def test_context_roundtrip(ids: Any, parent: str | None, parent_tokens: int) -> None:
    got_parent, got = decode_context(encode_context(Context("0" * 64, ids, parent), parent_tokens=parent_tokens))
    assert got_parent == parent
    assert_same(got, ids[parent_tokens:])


@pytest.mark.parametrize(("largest", "width"), [(0xFFFF, 2), (0x10000, 3), (0xFFFFFF, 3)])
def test_ids_take_the_smallest_width(largest: int, width: int) -> None:
    ids = as_ids([[0, 1], [largest, 2]])
    packed = pack_ids(ids)
    assert (packed["w"], len(packed["b"])) == (width, 4 * width)
    assert_same(unpack_ids(packed, "ids"), ids)


def test_u24_is_little_endian() -> None:
    assert pack_ids(as_ids([0x010203]))["b"] == bytes([3, 2, 1])


def test_ids_beyond_three_bytes_are_refused() -> None:
    with pytest.raises(CodecError, match="16777216"):
        pack_ids(as_ids([1 << 24]))


def test_ids_that_are_not_contiguous() -> None:
    ids = as_ids(np.arange(0x20000, 0x20000 + 24).reshape(4, 6))[::2, ::3]
    assert_same(unpack_ids(pack_ids(ids), "ids"), as_ids(ids))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(DECODERS))
def test_random_bytes_raise_codec_error(body: bytes, decode: Any) -> None:
    with pytest.raises(CodecError):
        decode(body)


leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | names | st.binary(max_size=12)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)


@settings(max_examples=300)
@given(requests, responses, st.data())
def test_messages_with_one_wrong_value_decode_or_raise_codec_error(
    request_: ScoreRequest, response: ScoreResponse, data: st.DataObject
) -> None:
    """Replace any one node of a valid message by anything msgpack can carry."""
    for body, decode in ((encode_request(request_), decode_request), (encode_response(response), decode_response)):
        message = msgpack.unpackb(body)
        holders = list(containers(message))
        holder = data.draw(st.sampled_from(range(len(holders))).map(holders.__getitem__))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        holder[data.draw(st.sampled_from(keys))] = data.draw(trees)
        with_error_swallowed(decode, msgpack.packb(message))


@settings(max_examples=200)
@given(requests, st.data())
def test_truncated_and_flipped_requests(request_: ScoreRequest, data: st.DataObject) -> None:
    body = encode_request(request_)
    with pytest.raises(CodecError):
        decode_request(body[: data.draw(st.integers(0, len(body) - 1))])
    with pytest.raises(CodecError):
        decode_request(body + b"\x00")
    at = data.draw(st.integers(0, len(body) - 1))
    flipped = body[:at] + bytes([body[at] ^ data.draw(st.integers(1, 255))]) + body[at + 1 :]
    with_error_swallowed(decode_request, flipped)


def containers(value: Any) -> Any:
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner)


def with_error_swallowed(decode: Any, body: bytes) -> None:
    try:
        decode(body)
    except CodecError as error:
        assert str(error)  # noqa: PT017 - any other exception fails the test; this one must say something


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a list said to have four billion entries"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map said to have four billion entries"),
        pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes said to be four billion"),
        pytest.param(b"\x91" * 100_000, id="lists in lists"),
        pytest.param(b"\xdd\x00\x00\x40\x00" + (b"\x9f" + b"\x80" * 15) * 16_384, id="many small maps"),
        pytest.param(b"\x92" + (b"\xdd\x00\x00\x40\x00" + b"\xc0" * 16_384) * 2, id="several long lists"),
    ],
)
def test_bodies_that_ask_for_memory(decode: Any, body: bytes) -> None:
    """Decoding needs at most a small multiple of the bytes sent."""
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(body)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v": 2}, "protocol version"),
        ({"mode": "guess"}, "at_ids"),
        ({"temperature": "hot"}, "temperature"),
        ({"k": True}, "k:"),
        ({"items": {}}, "items"),
        ({"items": [{"prompt": {"n": [3], "w": 2, "b": b"12"}}]}, r"items\[0\].prompt.*6 bytes, 2 came"),
        ({"items": [{"prompt": {"n": [1], "w": 4, "b": b"1234"}}]}, "2 or 3"),
        ({"items": [{"context": "AB" * 32}]}, "hex"),
    ],
)
def test_errors_name_the_field(change: dict[str, Any], says: str) -> None:
    message = msgpack.unpackb(encode_request(ScoreRequest("1", "r", "sampled", 1.0, 0, ())))
    with pytest.raises(CodecError, match=says):
        decode_request(msgpack.packb({**message, **change}))


@pytest.mark.parametrize(("vocabulary", "request_bytes"), [(49_152, 530), (151_936, 800)])
def test_bytes_per_token_at_k_256(vocabulary: int, request_bytes: int) -> None:
    """Size budget: at most 530 bytes per token in a reply and 800 in a request."""
    rng = np.random.default_rng(0)
    tokens, k, count = 64, 256, 16
    request_ = ScoreRequest(
        "0" * 32,
        "run",
        "at_ids",
        1.0,
        k,
        tuple(
            ScoreItem(
                context="0" * 64,
                prompt_ids=as_ids(rng.integers(0, vocabulary, 16)),
                response_ids=as_ids(rng.integers(0, vocabulary, tokens)),
                topk_ids=as_ids(rng.integers(0, vocabulary, (tokens, k))),
            )
            for _ in range(count)
        ),
    )
    score = ItemScore(
        logprobs=rng.normal(size=(tokens, k)).astype(np.float16),
        sampled_logprob=rng.normal(size=tokens).astype(np.float32),
        tail_logprob=rng.normal(size=tokens).astype(np.float32),
    )
    response = ScoreResponse("0" * 32, "0" * 64, 0, (score,) * count)
    assert len(encode_request(request_)) / (tokens * count) <= request_bytes
    assert len(encode_response(response)) / (tokens * count) <= 530
