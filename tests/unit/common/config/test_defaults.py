"""Defaults by the GPUs that a run's processes reserve."""

from __future__ import annotations

from typing import Any

import pytest

from common.config.defaults import enforce_eager, logit_chunk_tokens
from common.config.model import ConfigError
from tests.support.configs import config_of

GPUS: dict[str, Any] = {"rollout": {"gpus_per_worker": 1}, "learner": {"gpus_per_rank": 1}}


def test_where_the_gpus_are_cuda_graphs_nccl_and_larger_chunks_are_the_default() -> None:
    cpu, gpu = config_of(), config_of(**GPUS)
    assert [enforce_eager(one.rollout, deterministic=False) for one in (cpu, gpu)] == [True, False]
    assert [logit_chunk_tokens(one.learner) for one in (cpu, gpu)] == [256, 1024]
    assert [one.sync_in_run.backend for one in (cpu, gpu)] == ["gloo", "nccl"]
    assert enforce_eager(gpu.rollout, deterministic=True)


def test_a_key_that_is_set_is_kept() -> None:
    config = config_of(
        rollout={"gpus_per_worker": 1, "enforce_eager": True},
        learner={"gpus_per_rank": 1, "logit_chunk_tokens": 7},
        sync={"backend": "gloo"},
    )
    assert enforce_eager(config.rollout, deterministic=False)
    assert not enforce_eager(config_of(rollout={"enforce_eager": False}).rollout, deterministic=False)
    assert logit_chunk_tokens(config.learner) == 7
    assert config.sync_in_run.backend == "gloo"


@pytest.mark.parametrize(
    "sections",
    [
        {**GPUS, "rollout": {}},
        {**GPUS, "learner": {}},
        {**GPUS, "rollout": {"gpus_per_worker": 0.5, "gpu_memory_utilization": 0.4}},
        {**GPUS, "teacher": {"kind": "live"}},
        {**GPUS, "teachers": {"mean": {"kind": "ema", "gpus": 0.5}}},
    ],
    ids=["workers on CPU", "ranks on CPU", "a shared GPU", "a live teacher on CPU", "a teacher on a shared GPU"],
)
def test_weights_go_through_host_memory_if_a_member_has_no_gpu_for_itself(sections: dict[str, Any]) -> None:
    assert config_of(**sections).sync_in_run.backend == "gloo"
    with pytest.raises(ConfigError, match=r"sync.backend `nccl` sends between GPUs .*gpus.* must be 1 or more"):
        config_of(**sections, sync={"backend": "nccl"})


def test_a_frozen_teacher_takes_no_weights_and_deltas_need_host_memory() -> None:
    assert config_of(**GPUS, teachers={"cpu": {"gpus": 0}}).sync_in_run.backend == "nccl"
    assert config_of(**GPUS, sync={"delta": True}).sync_in_run.backend == "gloo"
