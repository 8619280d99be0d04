"""Prefetch: order, errors, one item ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from common.weight_sync.prefetch import prefetch


def test_the_next_item_is_made_while_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def source() -> Iterator[int]:
        for index, event in enumerate(made):
            event.set()
            yield index

    for index in prefetch(source()):
        if index < 2:
            assert made[index + 1].wait(10)
        if index == 0:
            assert not made[2].is_set()  # one ahead, not more: each is a bucket of memory


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise RuntimeError("broken")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(RuntimeError, match="broken"):
        next(items)


def test_a_consumer_that_stops_early_leaves_no_thread() -> None:
    def source() -> Iterator[int]:
        for index in range(100):
            time.sleep(0.01)
            yield index

    before = threading.active_count()
    items = prefetch(source())
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before
