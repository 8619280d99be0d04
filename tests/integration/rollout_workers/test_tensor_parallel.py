"""Engines with several GPUs inside a run's placement group, as far as vLLM's own configuration goes without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from common.config.model import Config, TeacherConfig
from learner.cluster.placement import Placement
from rollout_workers.engine.engine import engine_args
from teacher_server.backends.vllm.engine import engine_settings
from tests.support.engines import run_config


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that claims to have two GPUs."""
    ray.init("local", num_cpus=2, num_gpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


class Executors:
    """An actor in the placement group, in the position of a rollout worker or of a teacher."""

    def of_rollouts(self, model: str, config: Config) -> str:
        return self._resolved(engine_args(model, config, max_logprobs=8))

    def of_teacher(self, model: str, teacher: TeacherConfig) -> str:
        from vllm import EngineArgs

        settings = engine_settings(teacher, gpu=False)
        return self._resolved(EngineArgs(model=model, **{**settings, "worker_extension_cls": ""}))

    def of_vllms_own_choice(self, model: str) -> str:
        from vllm import EngineArgs

        return self._resolved(EngineArgs(model=model, tensor_parallel_size=2))

    def _resolved(self, args: Any) -> str:
        return str(args.create_engine_config().parallel_config.distributed_executor_backend)


def test_engines_of_several_gpus_run_their_workers_as_processes_of_the_actor(cluster: None, tiny_model: Path) -> None:
    plain = run_config(tiny_model)
    rollout = plain.rollout.model_copy(update={"tensor_parallel_size": 2, "gpus_per_worker": 1})
    config = plain.model_copy(update={"rollout": rollout})
    placement = Placement.reserve(config, workers_only=True)
    actor = ray.remote(Executors).options(**placement.options("worker 0")).remote()
    model = str(tiny_model)
    try:
        assert ray.get(actor.of_rollouts.remote(model, config)) == "mp"
        teacher = TeacherConfig(model=model, backend="vllm", tensor_parallel_size=2)
        assert ray.get(actor.of_teacher.remote(model, teacher)) == "mp"
        assert ray.get(actor.of_vllms_own_choice.remote(model)) == "ray"  # which then wants a bundle for each GPU
    finally:
        ray.kill(actor)
        placement.release()
