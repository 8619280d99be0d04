"""Items of one request: one context, bounded in bytes in both directions, tokens and number."""

from __future__ import annotations

from typing import get_args

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.protocol.codec import encode_request, encode_response
from common.protocol.schema import ItemScore, ScoreItem, ScoreMode, ScoreRequest, ScoreResponse, as_ids
from teacher_server.backends.wire_size import queue_tokens, reply_bytes, request_bytes
from teacher_server.client.request_batching import RequestLimits, split_requests
from tests.support.teacher_oracle import random_item
from tests.support.teacher_running import items

CONTEXTS = [None, "a" * 64, "b" * 64]

some_items = st.lists(
    st.builds(
        lambda seed, response, context: items(seed, 1, response=response, context=context)[0],
        st.integers(0, 9),
        st.integers(0, 40),
        st.sampled_from(CONTEXTS),
    ),
    max_size=12,
)


modes = st.sampled_from(get_args(ScoreMode))


def both_ways(item: ScoreItem, mode: ScoreMode, k: int) -> int:
    return max(request_bytes(item), reply_bytes(item, mode, k))


some_limits = st.builds(
    RequestLimits, st.integers(1, 4000), st.none() | st.integers(1, 5), st.none() | st.integers(1, 100)
)


@given(some_items, modes, st.integers(1, 300), some_limits)
def test_every_item_once_in_order_within_the_limits(
    entries: list[ScoreItem], mode: ScoreMode, k: int, limits: RequestLimits
) -> None:
    groups = list(split_requests(entries, lambda item: item, mode, k, limits))
    for context in CONTEXTS:
        expected = [id(item) for item in entries if item.context == context]
        assert [id(item) for group in groups for item in group if item.context == context] == expected
    for group in groups:
        assert len({item.context for item in group}) == 1
        assert len(group) == 1 or sum(both_ways(item, mode, k) for item in group) <= limits.max_bytes
        assert limits.max_items is None or len(group) <= limits.max_items
        assert len(group) == 1 or limits.max_tokens is None or sum(map(queue_tokens, group)) <= limits.max_tokens


def test_groups_are_as_few_as_the_limits_allow() -> None:
    entries = items(1, 10, context="a" * 64)
    size = request_bytes(entries[0])

    def sizes(mode: ScoreMode, k: int, **limits: int) -> list[int]:
        return [len(group) for group in split_requests(entries, lambda i: i, mode, k, RequestLimits(**limits))]

    assert sizes("at_ids", 8, max_bytes=4 * size) == [4, 4, 2]
    assert sizes("at_ids", 8, max_bytes=100 * size, max_items=9) == [9, 1]
    assert sizes("at_ids", 8, max_tokens=3 * queue_tokens(entries[0])) == [3, 3, 3, 1]
    assert sizes("teacher_topk", 1000, max_bytes=100 * size) == [1] * 10  # replies of 40,000 bytes


@given(some_items, modes)
def test_the_estimate_of_a_request_is_no_less_than_what_travels(entries: list[ScoreItem], mode: ScoreMode) -> None:
    body = encode_request(ScoreRequest("0" * 32, "run", mode, 1.0, 8, tuple(entries)))
    assert len(body) <= 128 + sum(map(request_bytes, entries))


@given(modes, st.integers(0, 9), st.integers(1, 300), st.integers(1, 50))
def test_the_estimate_of_a_reply_is_no_less_than_what_travels_and_not_much_more(
    mode: ScoreMode, tokens: int, k: int, asked: int
) -> None:
    rng = np.random.default_rng(0)
    item = random_item(rng, prompt=3, response=tokens, k=asked)
    picks = mode in ("teacher_topk", "union")
    width = (asked if mode in ("at_ids", "union") else 0) + (k if picks else 0)
    score = ItemScore(
        logprobs=np.zeros((tokens, width), np.float16),
        sampled_logprob=np.zeros(tokens, np.float32),
        tail_logprob=np.zeros(tokens, np.float32),
        topk_ids=as_ids(np.full((tokens, width), 70_000)) if picks else None,
    )
    travels = len(encode_response(ScoreResponse("0" * 32, "0" * 64, 0, (score,))))
    estimate = reply_bytes(item, mode, k)
    assert estimate - 256 <= travels <= 256 + estimate
