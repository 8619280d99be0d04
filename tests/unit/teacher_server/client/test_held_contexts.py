"""Contexts of single rows at the client: put once, kept while any score needs them, forgotten after the last."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.protocol.schema import Context, as_ids
from common.protocol.scoring import ScoringError
from teacher_server.client.client import ContextTooLong
from teacher_server.client.held_contexts import HeldContexts

CONTEXT = Context("c" * 64, as_ids([1, 2, 3]))


class Client:
    """Records the calls; the server's side alone is left out."""

    def __init__(self, error: Exception | None = None) -> None:
        self.kept: set[str] = set()
        self.puts = 0
        self._error = error

    def keep_context(self, context: Context) -> None:
        self.kept.add(context.hash)

    def forget_context(self, name: str) -> None:
        self.kept.discard(name)

    async def put_context(self, context: Context) -> None:
        await asyncio.sleep(0)
        self.puts += 1
        if self._error is not None:
            raise self._error


def held_by(client: Client) -> HeldContexts:
    stand_in: Any = client
    return HeldContexts(stand_in)


async def test_a_context_is_put_once_and_kept_until_the_last_score_that_needs_it() -> None:
    client = Client()
    held = held_by(client)
    async with held.hold(CONTEXT):
        async with held.hold(CONTEXT):
            assert client.kept == {CONTEXT.hash}
        assert client.kept == {CONTEXT.hash}  # so that the client can put it again if the server evicts it
    assert client.kept == set()
    async with held.hold(CONTEXT):
        assert client.kept == {CONTEXT.hash}
    assert client.puts == 1


async def test_scores_at_the_same_time_share_a_put() -> None:
    client = Client()
    held = held_by(client)

    async def score() -> None:
        async with held.hold(CONTEXT):
            assert client.puts == 1

    await asyncio.gather(*(score() for _ in range(8)))
    assert (client.puts, client.kept) == (1, set())


async def test_a_context_that_is_too_long_costs_its_samples_and_no_memory() -> None:
    client = Client(ContextTooLong("3 tokens, at most 2"))
    held = held_by(client)
    for _ in range(2):
        with pytest.raises(ScoringError, match="3 tokens, at most 2"):
            async with held.hold(CONTEXT):
                pass
        assert client.kept == set()
    assert client.puts == 2
