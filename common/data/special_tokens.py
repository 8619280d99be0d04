"""The one meaning of "special" and of "end" for stops, answers, prompts and their checks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from common.data.rows import Row
from common.data.token_text import decode_ids


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return text -> id of every special token: named in the tokenizer's map, or flagged in its vocabulary alone."""
    flagged = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
    return {**flagged, **named}


def end_ids(tokenizer: Any, generation_config_eos: int | Sequence[int] | None = None) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    configured = generation_config_eos if isinstance(generation_config_eos, Sequence) else [generation_config_eos]
    return frozenset(int(token) for token in (*configured, tokenizer.eos_token_id) if token is not None)


def answer_text(tokenizer: Any, ids: Sequence[int], ends: Collection[int], stop_strings: Sequence[str] = ()) -> str:
    """Return the text of an answer, up to its first stop string and without the token of `ends` that ends it.

    Special tokens inside the answer are text like any other: a tag reads the same whether or not it is special.
    """
    body = ids[:-1] if len(ids) and ids[-1] in ends else ids
    return cut_text(decode_ids(tokenizer, ids), stop_strings)[: len(decode_ids(tokenizer, body))]


def cut_text(text: str, stop_strings: Sequence[str]) -> str:
    """Return `text` up to the first stop string."""
    found = [text.find(stop) for stop in stop_strings if stop in text]
    return text[: min(found)] if found else text


def control_tokens(tokenizer: Any, rows: Iterable[Row]) -> dict[str, str]:
    """Return row id -> first special token whose text stands in a message of the row.

    A tokenizer turns such text into control tokens, with which a pasted log or a hostile post can end the user's turn.
    Raw prompts are left out: they hold the marks of a chat on purpose.
    """
    pattern, found = _any_special(tokenizer), {}
    for row in rows:
        hits = (pattern.search(message.content) for message in row.messages or ())
        if (first := next((hit for hit in hits if hit is not None), None)) is not None:
            found[row.id] = first.group()
    return found


def control_token_in(tokenizer: Any, text: str) -> str | None:
    """Return the first special token whose text stands in `text`; None if there is none."""
    hit = _any_special(tokenizer).search(text)
    return None if hit is None else hit.group()


def _any_special(tokenizer: Any) -> re.Pattern[str]:
    texts = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def leading_count(ids: Sequence[int], token: int | None) -> int:
    """Return how many times `token` stands at the start of `ids`."""
    return next((count for count, one in enumerate(ids) if one != token), len(ids))
