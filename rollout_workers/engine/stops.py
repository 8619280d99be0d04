"""String stops as tokens: the engine never has to turn tokens into text while it generates.

A stop string that lies inside single tokens (a newline, a special token) becomes the list of those tokens. One that can
be spelt by several tokens is looked for in the text of the finished answer, which is then cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Stops:
    """`token_ids`: each one completes a stop string by itself. `spanning`: strings that several tokens can spell."""

    token_ids: tuple[int, ...]
    spanning: tuple[str, ...]


def resolve_stops(stops: Sequence[str], texts: Sequence[str], specials: dict[str, int]) -> Stops:
    """Token-level form of `stops`.

    `texts` is the decoded text of every id of the vocabulary; `specials` maps the text of special tokens to their id.
    A single character cannot span tokens that decode on their own, a special token is never spelt by others: both are
    exact as token lists. Raises ValueError for an empty stop.
    """
    tokens: set[int] = set()
    spanning = []
    for stop in stops:
        if not stop:
            raise ValueError("rollout.stop holds an empty string: every answer would be empty")
        if stop in specials:
            tokens.add(specials[stop])
            continue
        tokens.update(index for index, text in enumerate(texts) if stop in text)
        if len(stop) > 1 or not stop.isascii():
            spanning.append(stop)
    return Stops(tuple(sorted(tokens)), tuple(spanning))


def first_stop(ids: Sequence[int], spanning: Sequence[str], decode: Decode) -> int | None:
    """How many tokens of `ids` to keep so that the last one completes the first stop string; None if none occurs."""
    if not any(stop in decode(ids) for stop in spanning):
        return None
    low, high = 1, len(ids)  # the text of a longer prefix contains what a shorter one does
    while low < high:
        middle = (low + high) // 2
        if any(stop in decode(ids[:middle]) for stop in spanning):
            high = middle
        else:
            low = middle + 1
    return low


def cut_text(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text
