"""Helpers for asyncio: awaiting object references, and work in the background of a block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def value_of(reference: Any) -> Awaitable[Any]:
    """Awaitable value of an object reference (any object with ``future()``)."""
    return asyncio.wrap_future(reference.future())


async def all_of(references: Sequence[Any]) -> list[Any]:
    """Values of object references, in order; raises the error of the first one that fails."""
    return list(await asyncio.gather(*map(value_of, references)))


async def within(seconds: float, awaitable: Any) -> Any:
    """Value of a coroutine or object reference; raises TimeoutError after `seconds`."""
    work = awaitable if asyncio.iscoroutine(awaitable) else value_of(awaitable)
    return await asyncio.wait_for(work, seconds)


async def despite_cancel(work: Coroutine[Any, Any, T]) -> T:
    """Value of `work`, which a first cancellation of the caller lets end. It reaches the caller at its next wait."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        value = await task  # a second cancellation ends it
        caller = asyncio.current_task()
        assert caller is not None
        caller.uncancel()
        caller.cancel()
        return value


@asynccontextmanager
async def run_in_background(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `coroutines` while the block runs, and cancel them at its end.

    An error of one coroutine cancels the block and is raised here, outside any ExceptionGroup.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
