"""Functions for ``context.from_rollout`` in tests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

CALLS: dict[str, int] = {"now": 0, "most": 0}


async def by_row(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Depend on everything; leave out the rows that say so, and fail for others."""
    if row.get("hint") == "drop":
        return None
    if row.get("hint") == "fail":
        raise KeyError("no such\nthing")
    return f"{row['hint']}: {prompt!r} was answered {response!r}"


async def slow(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Count the calls under way."""
    CALLS["now"] += 1
    CALLS["most"] = max(CALLS["most"], CALLS["now"])
    await asyncio.sleep(row.get("seconds", 0.01))
    CALLS["now"] -= 1
    return "text"


async def blank(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Return no text."""
    return " "


def plain(row: Mapping[str, Any], prompt: str, response: str) -> str | None:
    """Not async."""
    return "text"


async def of_two(row: Mapping[str, Any], prompt: str) -> str | None:
    """One argument short."""
    return "text"
