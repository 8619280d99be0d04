"""Who has which rank in the weight group, engines of several GPUs among them. (The group itself forms elsewhere.)"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from learner.cluster.services import Services
from learner.cluster.teachers import Teachers
from tests.support.stub_loop import config_of

JOINED: Future[None] = Future()
JOINED.set_result(None)


class Member:
    """An actor that remembers how it was asked to join."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.open_sync = self.join_sync = SimpleNamespace(remote=self._join)
        self.address = SimpleNamespace(remote=self._address)

    def _join(self, *args: Any) -> Any:
        self.asked.append(args)
        return SimpleNamespace(future=lambda: JOINED)

    def _address(self) -> Any:
        async def address() -> tuple[str, int]:
            return "host", 7

        return address()


@pytest.mark.parametrize("size", [1, 3])
def test_every_gpu_of_every_engine_has_a_rank_of_its_own(size: int) -> None:
    """The learner is 0, each engine begins where the one before ends, the teachers follow."""
    services = Services(config_of(tensor_parallel_size=size))
    sender, workers, teachers = Member(), [Member(), Member()], [Member(), Member()]
    services.ranks = [sender, Member()]
    services.teachers = cast(Teachers, SimpleNamespace(receivers=[SimpleNamespace(handle=one) for one in teachers]))
    asyncio.run(services.open_sync([cast(Any, SimpleNamespace(handle=one)) for one in workers]))
    world = 1 + 2 * size + 2
    assert sender.asked == [("host", 7, world)]
    first = [args[2] for member in [*workers, *teachers] for args in member.asked]
    assert first == [1, 1 + size, 1 + 2 * size, 2 + 2 * size]
    assert all(member.asked[0][:2] == ("host", 7) and member.asked[0][3] == world for member in [*workers, *teachers])
    assert services.ranks[1].asked == []
    taken = [0, *(rank + gpu for rank in first[:2] for gpu in range(size)), *first[2:]]
    assert taken == list(range(world))
