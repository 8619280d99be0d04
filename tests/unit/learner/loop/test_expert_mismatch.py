"""Shares of experts that an engine does not choose, by layer, and the place of the figure in a sync."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from learner.loop.expert_mismatch import expert_mismatch
from learner.loop.weight_publisher import WeightPublisher
from rollout_workers.pool.pool import Worker
from tests.support.configs import config_of

ENGINE = [np.array([[[0, 0], [1, 2]], [[0, 0], [3, 0]]]), np.array([[[0, 0], [0, 1]]])]
"""Two sequences of 2 and 1 tokens, 2 layers of which the second has experts, 2 experts a token."""


def test_shares_of_all_tokens_by_layer_whatever_the_order() -> None:
    learner = [{1: np.array([[2, 1], [3, 2]])}, {1: np.array([[2, 3]])}]
    assert expert_mismatch(ENGINE, learner) == {"expert_mismatch/layer_1": 3 / 6}
    same = [{1: np.array([[2, 1], [0, 3]])}, {1: np.array([[1, 0]])}]
    assert expert_mismatch(ENGINE, same) == {"expert_mismatch/layer_1": 0.0}


async def test_a_sync_keeps_the_worst_engine_of_each_layer() -> None:
    workers = [Worker(number, number, None) for number in range(2)]
    learner = [{0: np.array([[0, 9], [0, 8]]), 1: np.array([[1, 2], [3, 0]])}, {0: ENGINE[1][:, 0], 1: ENGINE[1][:, 1]}]
    other = [np.flip(one, axis=1) for one in ENGINE]  # right in fewer places of layer 1, in more of layer 0

    async def experts(group: list[Worker], _: Any) -> Any:
        assert group == workers
        return [ENGINE, other], learner

    async def nothing(*_: Any) -> Any:
        return [np.zeros(4, np.float32)]

    async def probe_engines(group: list[Worker], _: Any) -> Any:
        return [[np.zeros(4, np.float32)] for _ in group]

    pool = SimpleNamespace(members=workers, ready=[], failures=0)
    services: Any = SimpleNamespace(pool=pool, group=workers, learner_info=SimpleNamespace(dtype="float32"))
    services.experts, services.probe_engines = experts, probe_engines
    services.probe_learner = services.publish = nothing
    config = config_of(sync={"expert_mismatch": True}, rollout={"gpus_per_worker": 1})
    publisher = WeightPublisher(config, services, status=print)
    publisher._learner_at_0 = await nothing()
    await publisher._begin_gates(workers)
    await publisher.publish(1)
    each = [expert_mismatch(one, learner) for one in (ENGINE, other)]
    assert publisher.expert_mismatch == {name: max(one[name] for one in each) for name in each[0]}
    assert each[0]["expert_mismatch/layer_1"] == 0.0 < each[1]["expert_mismatch/layer_1"]
