"""Learner and engines that share GPUs take turns. (The engines' side needs a GPU: here it only has to exist.)"""

from __future__ import annotations

import inspect

from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from tests.support.stub_loop import TakesTurns, config_of, loop_over


async def test_engines_sleep_while_the_learner_trains_and_wake_for_the_new_weights() -> None:
    config = config_of(colocated=True)
    services = TakesTurns()
    loop = loop_over(services, config)
    await loop.begin(0)
    await loop.step(0)
    assert services.order == [*["rollout"] * 4, "sleep", "accumulate", "step", "wake", "publish"]
    await loop.close()


def test_the_engine_has_the_calls_that_sleeping_needs() -> None:
    inspect.signature(AsyncLLM.sleep).bind(None, level=1)
    inspect.signature(AsyncLLM.wake_up).bind(None)
    assert "enable_sleep_mode" in inspect.signature(AsyncEngineArgs).parameters
