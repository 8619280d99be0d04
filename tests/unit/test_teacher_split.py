"""Which items travel together: one context a request, bounded in bytes and in number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.codec import encode_request
from common.schema import ScoreItem, ScoreRequest
from teacher_server.client.split import requests, wire_bytes
from tests.teacher_running import items

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


@given(some_items, st.integers(1, 4000), st.none() | st.integers(1, 5))
def test_every_item_once_in_order_within_the_bounds(
    entries: list[ScoreItem], most_bytes: int, most_items: int | None
) -> None:
    groups = list(requests(entries, lambda item: item, most_bytes=most_bytes, most_items=most_items))
    for context in CONTEXTS:
        expected = [id(item) for item in entries if item.context == context]
        assert [id(item) for group in groups for item in group if item.context == context] == expected
    for group in groups:
        assert len({item.context for item in group}) == 1
        assert len(group) == 1 or sum(map(wire_bytes, group)) <= most_bytes
        assert most_items is None or len(group) <= most_items


def test_groups_are_as_few_as_the_bounds_allow() -> None:
    entries = items(1, 10, context="a" * 64)
    size = wire_bytes(entries[0])
    assert [len(group) for group in requests(entries, lambda i: i, most_bytes=4 * size)] == [4, 4, 2]
    assert [len(group) for group in requests(entries, lambda i: i, most_bytes=100 * size, most_items=9)] == [9, 1]


@given(some_items)
def test_the_estimate_is_no_less_than_what_travels(entries: list[ScoreItem]) -> None:
    body = encode_request(ScoreRequest("0" * 32, "run", "at_ids", 1.0, 8, tuple(entries)))
    assert len(body) <= 128 + sum(map(wire_bytes, entries))
