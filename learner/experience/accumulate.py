"""Lists of insights from successive problems into nested contexts under a cap. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Accumulated:
    """The context after some problems: its items, oldest first, how many were dropped to get there, its tokens."""

    problems: int
    items: tuple[str, ...]
    dropped: int
    text: str
    tokens: int


def accumulate(
    lists: Sequence[Sequence[str]],
    *,
    max_tokens: int,
    render: Callable[[tuple[str, ...]], str],
    count_tokens: Callable[[str], int],
) -> Iterator[Accumulated]:
    """A context after each of `lists`, one list a problem: all items so far, concatenated; above `max_tokens` (of the
    rendered text) whole items leave, oldest first, and do not come back.

    Nothing is yielded while there is no item.
    """
    kept: list[str] = []
    dropped = 0
    for problems, items in enumerate(lists, start=1):
        kept += items
        text = render(tuple(kept))
        while kept and (tokens := count_tokens(text)) > max_tokens:
            kept.pop(0)
            dropped += 1
            text = render(tuple(kept))
        if kept:
            yield Accumulated(problems, tuple(kept), dropped, text, tokens)
