"""Prefetch of the next item while the current one is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")

_END = object()


def prefetch(source: Iterator[T]) -> Generator[T]:
    """Yield the items of `source`; another thread computes the next one meanwhile.

    An error of `source` is raised after the items before it. Closing early waits for the item in progress.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending = pool.submit(next, source, _END)
        while (item := pending.result()) is not _END:
            pending = pool.submit(next, source, _END)
            yield cast(T, item)
            del item  # free its memory before the next one is waited for
