"""Learner and engines that share GPUs take turns. (The engines' side needs a GPU: here it only has to exist.)"""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from learner.controller import Controller
from learner.parity import ParityReport
from learner.reports import AccumulateReport, StepReport
from learner.services import Services
from tests.unit.test_stream import ROWS, StubServices, config_of


class TakesTurns(StubServices):
    """Notes the order of what the loop asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.pool = SimpleNamespace(
            watch=self._idle, only_replacements=self._idle, restarts=0, reissued=0, members=[1], ready=[]
        )
        self.teachers = SimpleNamespace(watch=self._idle)

    async def _idle(self) -> None:
        await asyncio.Event().wait()

    def leave_nodes_that_go(self) -> None:
        pass

    async def rollout(self, sample: Any) -> Any:
        self.order.append("rollout")
        return await super().rollout(sample)

    async def sleep(self) -> None:
        self.order.append("sleep")

    async def wake(self) -> None:
        self.order.append("wake")

    def accumulate(self, group: Any) -> list[Any]:
        self.order.append("accumulate")
        report = AccumulateReport(sum(map(len, group)), 0, 0, 0, 1, 0.0, 0.0)
        done: Future[AccumulateReport] = Future()
        done.set_result(report)
        return [SimpleNamespace(future=lambda: done)]

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        self.order.append("step")
        return [StepReport(1, True, 0, {"kl/full_bound": 1.0})]


async def test_engines_sleep_while_the_learner_trains_and_wake_for_the_new_weights() -> None:
    config = config_of(colocated=True)
    services = TakesTurns()
    controller = Controller(config, cast(Services, services), ROWS, lambda _: None)

    async def publish(version: int) -> Any:
        services.order.append("publish")
        return ParityReport(0.0, 0.0, 0.0, 0.0)

    controller._publisher.publish = publish
    await controller.begin(0)
    await controller.step(0)
    assert services.order == [*["rollout"] * 4, "sleep", "accumulate", "step", "wake", "publish"]
    await controller.close()


def test_the_engine_has_the_calls_that_sleeping_needs() -> None:
    inspect.signature(AsyncLLM.sleep).bind(None, level=1)
    inspect.signature(AsyncLLM.wake_up).bind(None)
    assert "enable_sleep_mode" in inspect.signature(AsyncEngineArgs).parameters
