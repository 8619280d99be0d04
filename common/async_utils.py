"""Object references (anything with a ``future()``) as what asyncio waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any


def value_of(reference: Any) -> Awaitable[Any]:
    """An object reference as something that asyncio's functions accept."""
    return asyncio.wrap_future(reference.future())


async def all_of(references: Sequence[Any]) -> list[Any]:
    """Values of object references, in their order; raises what the first one to fail raised."""
    return list(await asyncio.gather(*map(value_of, references)))


async def within(seconds: float, awaitable: Any) -> Any:
    """The value of a coroutine or reference; raises TimeoutError after `seconds`."""
    work = awaitable if asyncio.iscoroutine(awaitable) else value_of(awaitable)
    return await asyncio.wait_for(work, seconds)
