"""Answers that wait for a pass of the learner (its top-k ids, the base model's score), a micro-batch per rank each."""

from __future__ import annotations

import asyncio
from typing import Any

from common.config.model import Config
from learner.cluster.services import Prepared, Services
from learner.loop.micro_batcher import MicroBatchFiller

Place = tuple[asyncio.Task[list[Prepared]], int]
"""The task of a group's pass, and an answer's place in its result."""


class LearnerPasses:
    """Groups answers as they come; every rank takes its part of a group, since a pass may be a collective."""

    def __init__(self, config: Config, services: Services) -> None:
        self._services = services
        self._filler: MicroBatchFiller[tuple[Any, asyncio.Future[Place]]] = MicroBatchFiller(
            config.learner.ranks, config.learner.micro_batch_tokens
        )

    def __len__(self) -> int:
        """Answers that wait for a group to be full."""
        return len(self._filler)

    def add(self, tokens: int, item: Any) -> asyncio.Future[Place]:
        """Take the reference to an unscored answer of `tokens` tokens (prompt + response); resolves when the group is
        full, or after `flush`.
        """
        future: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        for group in self._filler.add(tokens, (item, future)):
            self._start(group)
        return future

    def flush(self) -> None:
        """Do what waits: nobody else comes, or nobody else is needed."""
        for group in self._filler.flush():
            self._start(group)

    def _start(self, group: list[list[tuple[Any, asyncio.Future[Place]]]]) -> None:
        # The ranks are asked here, not in the task: all of them get all groups in one order.
        asked = self._services.prepare([[item for item, _ in share] for share in group])
        task = asyncio.get_running_loop().create_task(asked)
        for place, future in enumerate(future for share in group for _, future in share):
            if not future.done():
                future.set_result((task, place))
