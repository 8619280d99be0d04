"""What the GPUs that a run's processes reserve imply."""

from __future__ import annotations

from typing import Any

import pytest

from common.config.gpus import enforce_eager, logit_chunk_tokens, memory_utilization
from common.config.model import ConfigError
from common.devices import limit_memory
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


SHARED: dict[str, Any] = {"rollout": {"gpus_per_worker": 0.5}, "learner": {"gpus_per_rank": 0.5}}


def test_ipc_is_for_members_on_one_gpu() -> None:
    ipc = {"backend": "ipc"}
    assert config_of(**SHARED, sync=ipc).sync_in_run.backend == "ipc"
    apart = (
        GPUS,
        {**SHARED, "rollout": {"gpus_per_worker": 0.6}},
        {**SHARED, "rollout": {"gpus_per_worker": 0.5, "max_workers": 2}},
        {**SHARED, "teacher": {"kind": "live"}},
        {**SHARED, "teacher": {"gpus": 0.1}},
    )
    for sections in apart:
        with pytest.raises(ConfigError, match=r"sync.backend `ipc` is for processes that share one GPU"):
            config_of(**sections, sync=ipc)


def test_an_engine_on_a_part_of_a_gpu_takes_that_part_of_its_memory() -> None:
    assert [memory_utilization(None, gpus) for gpus in (0, 0.5, 1, 4)] == [0.9, 0.45, 0.9, 0.9]
    assert memory_utilization(0.3, 0.5) == 0.3


def test_a_process_on_a_part_of_a_gpu_is_limited_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", limits.append)
    for gpus in (0, 0.25, 1, 2):
        limit_memory(gpus)
    assert limits == [0.25]


def test_a_frozen_teacher_takes_no_weights_and_deltas_need_host_memory() -> None:
    assert config_of(**GPUS, teachers={"cpu": {"gpus": 0}}).sync_in_run.backend == "nccl"
    assert config_of(**GPUS, sync={"delta": True}).sync_in_run.backend == "gloo"
