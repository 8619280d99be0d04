"""Stop strings as tokens, so that the engine need not decode text while it generates.

A stop string inside single tokens (a newline, a special token) becomes the list of those tokens. One that several
tokens can spell is searched in the text of the finished answer, which is then cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class StopTokens:
    """`token_ids`: tokens that each complete a stop string. `spanning`: stop strings that several tokens can spell."""

    token_ids: tuple[int, ...]
    spanning: tuple[str, ...]


def resolve_stop_strings(stop_strings: Sequence[str], texts: Sequence[str], specials: dict[str, int]) -> StopTokens:
    """Convert stop strings to tokens. Raises ValueError for an empty string.

    `texts` is the decoded text of every id of the vocabulary, special tokens included; `specials` maps the text of
    special tokens to their ids (`common.data.special_tokens`). One ASCII character cannot span tokens, and a special
    token is one token: both are exact as token lists.
    """
    tokens: set[int] = set()
    spanning = []
    for stop in stop_strings:
        if not stop:
            raise ValueError("rollout.stop holds an empty string: every answer would be empty")
        if stop in specials:
            tokens.add(specials[stop])
            continue
        tokens.update(index for index, text in enumerate(texts) if stop in text)
        if len(stop) > 1 or not stop.isascii():
            spanning.append(stop)
    return StopTokens(tuple(sorted(tokens)), tuple(spanning))


def first_stop(ids: Sequence[int], spanning: Sequence[str], decode: Decode) -> int | None:
    """Number of tokens up to the one that completes the first stop string; None if no stop string occurs."""
    if not any(stop in decode(ids) for stop in spanning):
        return None
    low, high = 1, len(ids)  # bisection: the text of a longer prefix contains that of a shorter one
    while low < high:
        middle = (low + high) // 2
        if any(stop in decode(ids[:middle]) for stop in spanning):
            high = middle
        else:
            low = middle + 1
    return low
