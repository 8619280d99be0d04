"""A request id is computed once: while it runs, afterwards, and no longer than the cache remembers."""

from __future__ import annotations

import asyncio

import pytest

from teacher_server.replies import Conflict, Replies


class Count:
    """A computation that counts how often it is begun."""

    def __init__(self, reply: bytes = b"reply", *, keep: bool = True) -> None:
        self.begun = 0
        self.reply, self.keep = reply, keep
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def __call__(self) -> tuple[bytes, bool]:
        self.begun += 1
        await self.goes_on.wait()
        return self.reply, self.keep


def name(request_id: str) -> tuple[str, str, str]:
    return ("tenant", "run", request_id)


async def test_askers_at_the_same_time_share_one_computation() -> None:
    replies, compute = Replies(100), Count()
    compute.goes_on.clear()
    askers = [asyncio.create_task(replies.once(name("a"), b"d", compute)) for _ in range(5)]
    await asyncio.sleep(0)
    askers[0].cancel()  # the one that began it
    await asyncio.sleep(0)
    compute.goes_on.set()
    assert await asyncio.gather(*askers[1:]) == [b"reply"] * 4
    assert (compute.begun, replies.repeated) == (1, 4)


async def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    replies, compute = Replies(100), Count(b"x" * 30)
    for n in range(50):
        await replies.once(name(str(n)), b"d", compute)
        assert replies.nbytes <= 100
    assert await replies.once(name("49"), b"d", compute) == b"x" * 30
    assert compute.begun == 50
    await replies.once(name("0"), b"d", compute)
    assert compute.begun == 51


async def test_a_reply_larger_than_the_cache_is_given_and_not_kept() -> None:
    replies, compute = Replies(100), Count(b"x" * 101)
    for _ in range(2):
        assert len(await replies.once(name("a"), b"d", compute)) == 101
    assert (compute.begun, replies.nbytes) == (2, 0)


async def test_what_may_be_otherwise_next_time_is_computed_again() -> None:
    replies, compute = Replies(100), Count(keep=False)
    await replies.once(name("a"), b"d", compute)
    await replies.once(name("a"), b"d", compute)
    assert compute.begun == 2

    async def fails() -> tuple[bytes, bool]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await replies.once(name("b"), b"d", fails)
    assert await replies.once(name("b"), b"d", compute) == b"reply"


async def test_another_body_under_the_same_id_is_a_conflict_only_where_the_name_is_the_same() -> None:
    replies, compute = Replies(100), Count()
    compute.goes_on.clear()
    first = asyncio.create_task(replies.once(name("a"), b"one", compute))
    await asyncio.sleep(0)
    with pytest.raises(Conflict):
        await replies.once(name("a"), b"two", compute)
    compute.goes_on.set()
    await first
    with pytest.raises(Conflict):
        await replies.once(name("a"), b"two", compute)
    for other in (("other", "run", "a"), ("tenant", "other", "a")):
        assert await replies.once(other, b"two", compute) == b"reply"


async def test_nobody_waits_any_more() -> None:
    replies, compute = Replies(100), Count()
    compute.goes_on.clear()
    asked = asyncio.create_task(replies.once(name("a"), b"d", compute))
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    compute.goes_on.set()
    assert await replies.once(name("a"), b"d", compute) == b"reply"
    assert compute.begun == 2
