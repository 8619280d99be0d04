"""Insights in a model's answer. Pure."""

from __future__ import annotations

import re

from common.evaluation.graders import after_thinking

_ITEM = re.compile(r"^[ \t]*[-*•][ \t]*\**EXPERIENCE ITEM\**[ \t]*:\**[ \t]*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


def items_of(answer: str) -> tuple[str, ...]:
    """The text of every line ``- EXPERIENCE ITEM: …`` behind the thinking, in order; equal ones once."""
    return tuple(dict.fromkeys(_ITEM.findall(after_thinking(answer))))
