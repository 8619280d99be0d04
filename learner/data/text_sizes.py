"""Texts that cannot fit, by their characters: found before a tokenizer spends minutes and gigabytes on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from common.config.model import Config
from common.data.model_lookup import model_limit
from learner.data.stored_rows import StoredRows


def oversized_texts(
    config: Config, tokenizer: Any, context: str, sets: Mapping[str, StoredRows], student_limit: int
) -> Iterator[str]:
    """Yield a line for every row, and for a context, with more characters than any tokens within the limit can hold.

    The bound is the limit times the characters of the vocabulary's longest token, far above what real text reaches.
    """
    longest = max(map(len, tokenizer.get_vocab()))
    teacher_limit = _teacher_limit(config)
    if teacher_limit is not None and len(context) > teacher_limit * longest:
        yield f"the context has {len(context):,} characters, more than {teacher_limit:,} tokens of a teacher can hold"
    for key, rows in sets.items():
        for index, (size, own) in enumerate(zip(rows.prompt_characters, rows.own_characters, strict=True)):
            if size > student_limit * longest:
                yield (
                    f"{key}: row {rows[index].id!r}: {size:,} characters, more than {student_limit:,} tokens of the "
                    "student can hold: shorten the row"
                )
            if own and teacher_limit is not None and len(context) + own > teacher_limit * longest:
                yield (
                    f"{key}: row {rows[index].id!r}: {len(context) + own:,} characters of context, more than "
                    f"{teacher_limit:,} tokens of a teacher can hold: shorten it"
                )


def _teacher_limit(config: Config) -> int | None:
    """The longest sequence of any teacher; None if one is unknown here."""
    limits = []
    for teacher in config.named_teachers().values():
        if teacher.url is not None:
            return None
        limits.append(teacher.max_sequence_tokens or model_limit(teacher.model or config.student.model))
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None
