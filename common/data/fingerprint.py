"""Identity of a tokenizer's ids and its chat template, which student and teacher compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the base vocabulary: the text of each id below ``tokenizer.vocab_size``.

    Tokens above it are `added_tokens`. Special ids (EOS, BOS), output width and chat template do not count: a base and
    an instruct model of one family differ in them, and their ids mean the same.
    """
    return _digest(_base(tokenizer))


def added_tokens(tokenizer: Any) -> dict[int, str]:
    """Return id -> text of the tokens above the base vocabulary."""
    size = tokenizer.vocab_size
    return {index: text for text, index in tokenizer.get_vocab().items() if index >= size}


def added_token_fault(student: Mapping[int, str], teacher: Mapping[int, str]) -> str | None:
    """Explain the first id that means another text to the teacher than to the student; None if there is none.

    The teacher may know more tokens, which the student then never says.
    """
    for index, text in sorted(student.items()):
        if teacher.get(index) != text:
            known = f"is {teacher[index]!r}" if index in teacher else "does not exist"
            return f"token id {index} is {text!r} for the student and {known} for the teacher"
    return None


def vocabulary_fault(student: Any, teacher: Any) -> str | None:
    """Explain why the `student` tokenizer's ids mean another text to the `teacher` tokenizer; None if they do not."""
    ours, theirs = _base(student), _base(teacher)
    if len(ours) != len(theirs):
        return (
            f"the student's vocabulary has {len(ours)} tokens, the teacher's {len(theirs)} (added tokens not counted)"
        )
    for (index, text), (_, other) in zip(ours, theirs, strict=True):
        if text != other:
            return f"token id {index} is {text!r} for the student and {other!r} for the teacher"
    return added_token_fault(added_tokens(student), added_tokens(teacher))


def chat_template_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of the chat template, or of the empty string for a tokenizer without one."""
    return _digest(tokenizer.chat_template or "")


def _base(tokenizer: Any) -> list[tuple[int, str]]:
    size = tokenizer.vocab_size
    return sorted((index, text) for text, index in tokenizer.get_vocab().items() if index < size)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
