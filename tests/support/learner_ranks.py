"""Learner engines in separate processes, in a world of one rank and in one of two.

The fixtures are for the ``conftest.py`` of a folder, whose tests share them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from learner.trainer.reports import AccumulateReport, StepReport
from tests.support.learner_oracle import SMOOTH
from tests.support.scored import learner_config

STAGES = (0, 1, 2, 3)
Cut = Sequence[Sequence[ScoredTrajectory]]


class Host:
    """A process in which engines are made one after another: DeepSpeed allows one process group a process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def port(self) -> int:
        from learner.trainer.distributed import free_port

        return free_port()

    def join(self, port: int) -> None:
        from learner.trainer.distributed import join_ranks

        torch.set_num_threads(1)
        join_ranks(self._rank, self._world_size, "127.0.0.1", port, torch.device("cpu"), 200.0)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self._rank, *args)


class Ranks:
    """`world_size` hosts in one group; `call` runs a function on all of them and returns every rank's result."""

    def __init__(self, world_size: int) -> None:
        actor = ray.remote(Host)
        self.hosts = [actor.options(num_cpus=0).remote(rank, world_size) for rank in range(world_size)]
        port = ray.get(self.hosts[0].port.remote())
        ray.get([host.join.remote(port) for host in self.hosts])

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return ray.get([host.call.remote(function, *args) for host in self.hosts])


@pytest.fixture(scope="package", autouse=True)
def cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    # Imported into a test module, the fixture would last until the session ends.
    assert isinstance(request.node, pytest.Package), "import these fixtures into the folder's conftest.py"
    mine = not ray.is_initialized()
    if mine:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=bool(os.environ.get("OPCD_TEST_LOGS")))
    yield
    if mine:
        ray.shutdown()


@pytest.fixture(scope="package")
def one(cluster: None) -> Ranks:
    """A world of one rank."""
    return Ranks(1)


@pytest.fixture(scope="package")
def two(cluster: None) -> Ranks:
    """A world of two ranks."""
    return Ranks(2)


def smooth_config(model: Path, stage: int = 0, **sections: dict[str, Any]) -> Config:
    learner = {**SMOOTH, "zero_stage": stage, **sections.pop("learner", {})}
    return learner_config(model, learner=learner, **sections)


def totals(scored: Sequence[ScoredTrajectory]) -> tuple[int, int]:
    return sum(len(item.trajectory.response_ids) for item in scored), len(scored)


def weights_now(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def step(
    rank: int, config: Config, cuts: Sequence[Cut]
) -> tuple[dict[str, Tensor], StepReport, list[AccumulateReport]]:
    """One optimiser step on `cuts[rank]`, one `accumulate` each; (weight change, report, reports)."""
    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    before = weights_now(engine)
    reports = [engine.accumulate(batch) for batch in cuts[rank]]
    report = engine.finish_step(*totals([item for cut in cuts for batch in cut for item in batch]))
    after = weights_now(engine)
    return {name: after[name] - before[name] for name in before}, report, reports
