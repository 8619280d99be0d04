"""Learner and engines that share GPUs take turns. (The engines' side needs a GPU: here it only has to exist.)"""

from __future__ import annotations

import inspect
from typing import Any, cast

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from learner.cluster.services import Services
from learner.loop.parity import ParityReport
from learner.loop.training_loop import TrainingLoop
from tests.support.stub_loop import ROWS, TakesTurns, config_of


async def test_engines_sleep_while_the_learner_trains_and_wake_for_the_new_weights() -> None:
    config = config_of(colocated=True)
    services = TakesTurns()
    controller = TrainingLoop(config, cast(Services, services), ROWS, lambda _: None)

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
