"""The text of single tokens, as parts of the text that they make together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

HALF = "\ufffd"
"""What a decoder gives for bytes that are no whole character yet."""


def text_of(tokenizer: Any, ids: Iterable[int]) -> str:
    """The text of `ids`, special tokens included, nothing tidied up."""
    return str(
        tokenizer.decode([int(one) for one in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One text a token; together they are `text_of` all.

    A token that ends within a character has no text of its own: the character stands at the token that completes it.
    """
    found: list[str] = []
    start = done = 0  # tokens from `start` on are decoded; the text of those before `done` has been given out
    for end in range(1, len(ids) + 1):
        before, whole = text_of(tokenizer, ids[start:done]), text_of(tokenizer, ids[start:end])
        if whole.endswith(HALF) and end < len(ids):
            found.append("")
            continue
        found.append(whole[len(before) :] if whole.startswith(before) else text_of(tokenizer, ids[done:end]))
        start, done = done, end
    return found
