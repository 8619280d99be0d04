"""Text of single tokens, such that the texts of a sequence join to its decoded text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
"""Decoded form of bytes that do not complete a character."""


def decode_ids(tokenizer: Any, ids: Iterable[int]) -> str:
    """Return the text of `ids`, special tokens included and spaces unchanged."""
    values = [int(token) for token in ids]
    return str(tokenizer.decode(values, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return one text per token; joined they equal `decode_ids` of all.

    A token that ends inside a character gets an empty text; the token that completes the character gets all of it.
    """
    texts: list[str] = []
    start = done = 0  # decode from `start`; texts before `done` are complete
    for end in range(1, len(ids) + 1):
        before, whole = decode_ids(tokenizer, ids[start:done]), decode_ids(tokenizer, ids[start:end])
        if whole.endswith(REPLACEMENT) and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else decode_ids(tokenizer, ids[done:end]))
        start, done = done, end
    return texts
