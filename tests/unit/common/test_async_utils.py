"""Work in the background of a block, and work that an interrupt lets end."""

from __future__ import annotations

import asyncio

import pytest

from common.async_utils import despite_cancel, run_in_background


async def test_coroutines_run_during_the_block_and_are_cancelled_at_its_end() -> None:
    events: list[str] = []

    async def background() -> None:
        events.append("started")
        try:
            await asyncio.Event().wait()
        finally:
            events.append("cancelled")

    async with run_in_background(background(), background()):
        await asyncio.sleep(0)
        events.append("block")
    assert events == ["started", "started", "block", "cancelled", "cancelled"]


async def test_an_error_in_the_background_cancels_the_block_and_is_raised_itself() -> None:
    async def fails() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async with run_in_background(fails()):
            await asyncio.wait_for(asyncio.Event().wait(), 10)


async def test_an_error_of_the_block_is_raised_itself_after_the_coroutines_ended() -> None:
    ended = asyncio.Event()

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def block() -> None:
        async with run_in_background(background()):
            await asyncio.sleep(0)
            raise KeyError("block")

    with pytest.raises(KeyError):
        await block()
    assert ended.is_set()


async def test_a_cancellation_waits_for_the_end_of_work_and_reaches_the_caller_then() -> None:
    events: list[str] = []
    release = asyncio.Event()

    async def work() -> str:
        await release.wait()
        events.append("work")
        return "value"

    async def caller() -> None:
        events.append(await despite_cancel(work()))
        await asyncio.sleep(0)
        events.append("not reached")

    task = asyncio.create_task(caller())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["work", "value"]
    assert task.cancelling() == 1  # as asyncio.run expects it after one Ctrl-C


async def test_a_second_cancellation_ends_the_work() -> None:
    async def work() -> None:
        await asyncio.Event().wait()

    task = asyncio.create_task(despite_cancel(work()))
    for _ in range(2):
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
