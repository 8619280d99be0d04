"""Extraction of the final answer from a model's text. Pure."""

from __future__ import annotations

import re

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LINE = re.compile(r"answer\s*(?:is)?\s*:[ \t*]*(\S[^\n]*)", re.IGNORECASE)
_BOXED = re.compile(r"\\f?boxed\s*\{")


def strip_thinking(text: str) -> str:
    """Return the text after the last ``</think>``, or the whole text if there is none."""
    return text.rpartition("</think>")[2]


def tagged_answer(text: str) -> str | None:
    """Return the content of the last ``<answer>…</answer>`` after the thinking, or None."""
    tags = _TAG.findall(strip_thinking(text))
    return tags[-1] if tags else None


def final_answer(text: str) -> str | None:
    r"""Return the last ``Answer:`` line or ``\boxed{…}`` after the thinking, whichever starts later, or None.

    A box inside an ``Answer:`` line is the answer.
    """
    text = strip_thinking(text)
    boxes = [(match.start(), inside) for match in _BOXED.finditer(text) if (inside := _braced(text, match.end()))]
    lines = [(match.start(), match.group(1)) for match in _LINE.finditer(text)]
    last = max((*boxes, *lines), default=None)
    return None if last is None else tidy(last[1])


def tidy(answer: str) -> str:
    """Remove dollar signs, bold stars, spaces and a full stop around an answer."""
    return answer.strip().strip("*$ \t").removesuffix(".").strip("*$ \t")


def _braced(text: str, start: int) -> str | None:
    """Return the text from `start` to the brace that closes it, or None if it stays open."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None
