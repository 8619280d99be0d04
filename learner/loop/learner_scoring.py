"""Forward passes of the learner over unscored rollouts: for its top-k ids, or for the base model's scores."""

from __future__ import annotations

import asyncio
from typing import Any

from common.config.model import LearnerConfig
from learner.cluster.services import Prepared, Services
from learner.loop.micro_batcher import MicroBatcher

Waiting = asyncio.Future[tuple[asyncio.Task[list[Prepared]], int]]
"""Resolves to the task of a group's pass and the rollout's index in its result, once the pass has started."""


class LearnerScoring:
    """Groups rollouts as they arrive, one micro-batch a rank, since a pass may be a collective of all ranks."""

    def __init__(self, learner: LearnerConfig, services: Services) -> None:
        self._services = services
        self._batcher: MicroBatcher[tuple[Any, Waiting]] = MicroBatcher(
            learner.ranks, learner.micro_batch_tokens, packed=services.packed
        )

    def __len__(self) -> int:
        """Rollouts that wait for a full group."""
        return len(self._batcher)

    def add(self, tokens: int, item: Any) -> Waiting:
        """Take the reference to a rollout of `tokens` tokens (prompt + response). Its pass starts when the group is
        full, or at `flush`.
        """
        waiting: Waiting = asyncio.get_running_loop().create_future()
        for group in self._batcher.add(tokens, (item, waiting)):
            self._start(group)
        return waiting

    def flush(self) -> None:
        """Start the pass of every group that is not full."""
        for group in self._batcher.flush():
            self._start(group)

    @staticmethod
    async def result(waiting: Waiting) -> Prepared:
        """Wait for the pass of a rollout that `add` took; raises what the pass raised."""
        task, index = await waiting
        return (await asyncio.shield(task))[index]

    def _start(self, group: list[list[tuple[Any, Waiting]]]) -> None:
        # The ranks are called here, not in the task: every rank must get the groups in the same order.
        task = asyncio.get_running_loop().create_task(
            self._services.prepare([[item for item, _ in share] for share in group])
        )
        for index, waiting in enumerate(waiting for share in group for _, waiting in share):
            if not waiting.done():  # cancelled with its rollout
                waiting.set_result((task, index))
