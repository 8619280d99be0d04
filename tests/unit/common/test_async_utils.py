"""Work in the background of a block: cancelled at the block's end, its error raised in the block's place."""

from __future__ import annotations

import asyncio

import pytest

from common.async_utils import run_in_background


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
