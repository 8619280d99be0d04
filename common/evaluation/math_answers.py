"""Final answers of competition mathematics: found in a text, compared as expressions by ``math-verify``."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from common.evaluation.graders import after_thinking

TIMEOUT_S = 5
"""For one expression: some of what models write takes a computer algebra system for ever."""

_LINE = re.compile(r"answer\s*(?:is)?\s*:[ \t*]*(\S[^\n]*)", re.IGNORECASE)
_BOXED = re.compile(r"\\f?boxed\s*\{")


def final_answer(text: str) -> str | None:
    r"""What a text ends up with: its last ``Answer:`` line or ``\boxed{…}``, whichever begins later; None without.

    Text before ``</think>`` does not count. A box inside an ``Answer:`` line is the answer.
    """
    text = after_thinking(text)
    boxes = [(match.start(), inside) for match in _BOXED.finditer(text) if (inside := _braced(text, match.end()))]
    lines = [(match.start(), match.group(1)) for match in _LINE.finditer(text)]
    found = max((*boxes, *lines), default=None)
    return None if found is None else _tidy(found[1])


def grade(answer: str, expected: str) -> bool:
    """Whether the final answer of `answer` equals `expected`: as text, else as mathematics."""
    found = final_answer(answer)
    if not found:
        return False
    wanted = final_answer(expected) or _tidy(expected)
    # The limits are signals, which only the main thread can take.
    limited = threading.current_thread() is threading.main_thread()
    limit = TIMEOUT_S if limited else None
    return found == wanted or bool(verify(_parsed(wanted, limit), _parsed(found, limit), timeout_seconds=limit))


@lru_cache(maxsize=4096)
def _parsed(expression: str, limit_s: int | None) -> Any:
    return parse(
        f"${expression}$",
        extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()],
        parsing_timeout=limit_s,
    )


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace before `start` and the one that closes it; None where none does."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None


def _tidy(answer: str) -> str:
    """An answer without dollars, bold stars, spaces around and a full stop."""
    return answer.strip().strip("*$ \t").removesuffix(".").strip("*$ \t")
