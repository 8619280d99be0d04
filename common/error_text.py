"""Errors of other libraries as one line of plain text."""

from __future__ import annotations

import re

MAX_CHARACTERS = 300
"""Length of an error in one line: texts of Ray, vLLM and the hub go on for pages."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def one_line(error: BaseException | str) -> str:
    """Return an error's text without line breaks and colour codes, cut to `MAX_CHARACTERS`; its type if it has none."""
    text = " ".join(_COLOURS.sub("", str(error)).split())
    return text[:MAX_CHARACTERS] or type(error).__name__
