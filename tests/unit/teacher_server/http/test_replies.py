"""Repeated requests: computed once, kept within bounds, and never after a failure."""

from __future__ import annotations

import asyncio

import pytest

from teacher_server.http.replies import ENTRY_BYTES, Conflict, Replies

NAME = ("tenant", "run", "id")
DIGEST = b"of a body"


class Work:
    """A computation that can be held. Counts its starts and cancellations."""

    def __init__(self, reply: bytes = b"reply", *, keep: bool = True) -> None:
        self.reply, self.keep = reply, keep
        self.open = asyncio.Event()
        self.open.set()
        self.begun = self.cancelled = 0

    async def __call__(self) -> tuple[bytes, bool]:
        self.begun += 1
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.reply, self.keep


async def ask(replies: Replies, work: Work, name: tuple[str, str, str] = NAME, digest: bytes = DIGEST) -> bytes:
    return await replies.once(name, digest, work)


async def begin(replies: Replies, work: Work, count: int) -> list[asyncio.Task[bytes]]:
    """Start `count` waiters of one held computation."""
    work.open.clear()
    tasks = [asyncio.create_task(ask(replies, work)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_askers_at_the_same_time_and_later_share_one_computation() -> None:
    replies, work, repeats = Replies(10_000), Work(), []
    tasks = await begin(replies, work, 3)
    work.open.set()
    assert await asyncio.gather(*tasks) == [b"reply"] * 3
    assert await replies.once(NAME, DIGEST, work, lambda: repeats.append(1)) == b"reply"
    assert (work.begun, repeats) == (1, [1])


async def test_another_body_under_the_same_name_conflicts_while_running_and_after() -> None:
    replies, work = Replies(10_000), Work()
    (task,) = await begin(replies, work, 1)
    with pytest.raises(Conflict):
        await ask(replies, work, digest=b"another")
    work.open.set()
    await task
    with pytest.raises(Conflict):
        await ask(replies, work, digest=b"another")
    for other in (("tenant", "run", "other"), ("tenant", "other", "id"), ("other", "run", "id")):
        assert await ask(replies, Work(b"its own"), other, b"another") == b"its own"


async def test_without_an_id_nothing_is_shared_or_kept() -> None:
    replies, work = Replies(10_000), Work()
    name = ("tenant", "run", "")
    await asyncio.gather(ask(replies, work, name), ask(replies, work, name, b"another"))
    assert (work.begun, replies.nbytes) == (2, 0)


async def test_the_last_asker_that_leaves_cancels_the_computation() -> None:
    replies, work = Replies(10_000), Work()
    one, two = await begin(replies, work, 2)
    one.cancel()
    await asyncio.sleep(0)
    assert work.cancelled == 0
    two.cancel()
    await asyncio.gather(one, two, return_exceptions=True)
    await asyncio.sleep(0)
    assert work.cancelled == 1
    work.open.set()
    assert await ask(replies, work) == b"reply"
    assert work.begun == 2


async def test_failures_and_passing_answers_are_tried_again() -> None:
    replies = Replies(10_000)

    async def fails() -> tuple[bytes, bool]:
        raise RuntimeError("injected")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="injected"):
            await replies.once(NAME, DIGEST, fails)
    passing = Work(keep=False)
    for _ in range(2):
        assert await ask(replies, passing, digest=b"whatever") == b"reply"
    assert (passing.begun, replies.nbytes) == (2, 0)


async def test_kept_replies_are_bounded_and_the_least_recently_used_leaves() -> None:
    replies = Replies(3 * (ENTRY_BYTES + 100))
    works = {name: Work(name.encode() * 100) for name in "abcd"}

    async def again(name: str) -> int:
        await ask(replies, works[name], ("tenant", "run", name))
        return works[name].begun

    for name in "abc":
        assert await again(name) == 1
    assert await again("a") == 1
    assert await again("d") == 1  # b leaves
    assert [await again(name) for name in "acd"] == [1, 1, 1]
    assert await again("b") == 2
    assert replies.nbytes == 3 * (ENTRY_BYTES + 100)
    await ask(replies, Work(b"x" * 10_000), ("tenant", "run", "large"))
    assert replies.nbytes == 3 * (ENTRY_BYTES + 100)


async def test_a_tenant_with_many_replies_evicts_its_own() -> None:
    replies, quiet = Replies(10 * ENTRY_BYTES), Work(b"")
    name = ("quiet", "run", "id")
    await ask(replies, quiet, name)
    for number in range(100):
        await ask(replies, Work(b""), ("busy", "run", str(number)))
    await ask(replies, quiet, name)
    assert quiet.begun == 1
    assert replies.nbytes == 10 * ENTRY_BYTES


async def test_tiny_replies_do_not_pile_up() -> None:
    replies = Replies(100 * ENTRY_BYTES)
    for number in range(1000):
        await ask(replies, Work(b""), ("tenant", "run", str(number)))
    assert replies.nbytes == 100 * ENTRY_BYTES
    work = Work(b"again")
    assert await ask(replies, work, ("tenant", "run", "0")) == b"again"  # the first ones left
