"""Work on the next item while the last one is being used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")

_END = object()


def ahead(source: Iterator[T]) -> Generator[T]:
    """The items of `source`, each made on another thread while the consumer uses the one before.

    Its error is raised after the items before it. A consumer that stops early waits for the item that is being made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = pool.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, source, _END)
            yield cast(T, item)
            del item  # its memory may be that of the next but one
