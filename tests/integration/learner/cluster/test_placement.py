"""Placement on a real cluster that claims to have GPUs, which are not used."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import ray

from common.config.model import Config, TeacherConfig
from learner.cluster import clocks
from learner.cluster.placement import Placement, PlacementError, cluster_gpus, free_gpus, unused_gpus
from learner.cluster.rank import LearnerRank
from learner.cluster.services import Services
from rollout_workers.actor import GROUPS, RolloutWorker
from teacher_server.actor import TeacherActor
from tests.support.configs import config_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=2, num_gpus=3, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


class Where:
    def gpus(self) -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]


class Ahead(clocks.Clock):
    def now(self) -> float:
        return super().now() + 7


async def test_a_clock_is_measured_on_its_node(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clocks.other_nodes() == {}
    ((node, address),) = [(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes()]
    same = await clocks.measure_clocks({node: address})
    assert clocks.clock_warning(same) is None
    assert abs(same[address].seconds) <= same[address].error_s
    monkeypatch.setattr(clocks, "Clock", Ahead)
    ahead = await clocks.measure_clocks({node: address})
    assert "7.0" in str(clocks.clock_warning(ahead))


def test_actors_get_the_places_that_were_reserved_and_give_them_back(cluster: None) -> None:
    config = config_of(rollout={"gpus_per_worker": 2}, learner={"gpus_per_rank": 1})
    placement = Placement.reserve(config)
    assert sum(free_gpus().values()) == 0  # held before any actor is there
    actor = ray.remote(Where)
    worker = actor.options(**placement.options("worker 0")).remote()
    rank = actor.options(**placement.options("rank 0")).remote()
    cpu_only = actor.options(**placement.options("teacher default")).remote()
    held = [ray.get(one.gpus.remote()) for one in (worker, rank, cpu_only)]
    assert [len(gpus) for gpus in held] == [2, 1, 0]
    assert not set(held[0]) & set(held[1])
    ray.kill(worker)  # its replacement gets the same GPUs
    again = actor.options(**placement.options("worker 0")).remote()
    assert len(ray.get(again.gpus.remote(), timeout=30)) == 2
    placement.release()


class SeeingWorker(RolloutWorker):
    async def visible(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


class SeeingRank(LearnerRank):
    def visible(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


class SeeingTeacher(TeacherActor):
    def visible(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def visible(placement: Placement, config: Config) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES in a worker, a rank and a teacher of the run."""
    actors = [
        ray.remote(concurrency_groups=GROUPS)(SeeingWorker)
        .options(**placement.options("worker 0"))
        .remote("m", config, None, max_logprobs=1),  # type: ignore[arg-type]
        ray.remote(SeeingRank).options(**placement.options("rank 0")).remote(0, 1, config),
        ray.remote(SeeingTeacher).options(**placement.options("teacher default")).remote(TeacherConfig(model="m")),
    ]
    seen: list[str | None] = ray.get([actor.visible.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)
    return seen


def test_an_actor_sees_the_gpus_that_it_reserved_and_no_others(cluster: None) -> None:
    """Ray leaves CUDA_VISIBLE_DEVICES unset for an actor without GPUs, which then computes on all of them."""
    config = config_of()
    assert cluster_gpus() == 3
    assert visible(Placement.reserve(config, placement_timeout_s=30), config) == ["", "", ""]
    config = config_of(rollout={"gpus_per_worker": 1}, learner={"gpus_per_rank": 1}, teacher={"gpus": 1})
    placement = Placement.reserve(config, placement_timeout_s=30)
    assert sorted(map(str, visible(placement, config))) == ["0", "1", "2"]
    placement.release()


def test_a_run_hears_which_of_its_actors_leave_the_gpus_alone(cluster: None) -> None:
    services = Services(config_of(learner={"gpus_per_rank": 1}))
    assert services.reserve(placement_timeout_s=30) == (
        "the cluster has 3 GPUs, but these reserve none and run on CPU: rollout workers, teacher default. Set "
        "rollout.gpus_per_worker, teacher.gpus"
    )
    services.close()
    config = config_of(teacher={"kind": "base"}, learner={"lora": {}, "gpus_per_rank": 1}, teachers={})
    assert str(unused_gpus(config, 3)).endswith("Set rollout.gpus_per_worker")
    assert str(unused_gpus(config, 3, workers_only=True)).endswith("Set rollout.gpus_per_worker")
    assert unused_gpus(config, 0) is None


def test_a_run_that_goes_on_waits_until_those_that_died_let_go(cluster: None) -> None:
    config = config_of(rollout={"gpus_per_worker": 3})
    before = Placement.reserve(config, placement_timeout_s=30)  # the test before has just let go
    threading.Timer(0.5, before.release).start()
    with pytest.raises(PlacementError):
        Placement.reserve(config)
    Placement.reserve(config, placement_timeout_s=30).release()


def test_a_run_that_has_patience_shows_its_demand_while_it_waits(cluster: None) -> None:
    """An autoscaler sees a pending placement group."""
    seen: list[str] = []

    def look() -> None:
        groups = ray.util.placement_group_table().values()
        seen.extend(group["state"] for group in groups if {"GPU": 4.0} in group["bundles"].values())

    threading.Timer(0.7, look).start()
    config = config_of(rollout={"gpus_per_worker": 4})
    with pytest.raises(
        PlacementError, match=r"4 GPUs were not .* within 2 s \(run.placement_timeout_s\): .* free are 3 \("
    ):
        Placement.reserve(config, placement_timeout_s=2)
    assert seen == ["PENDING"]
    services = Services(config_of(run={"name": "r", "placement_timeout_s": 1}, rollout={"gpus_per_worker": 4}))
    with pytest.raises(PlacementError, match="within 1 s"):
        services.reserve()


def test_what_no_cluster_can_hold_is_not_waited_for(cluster: None) -> None:
    with pytest.raises(PlacementError, match=r"worker 0 asks for 1.5 GPUs"):
        Placement.reserve(config_of(rollout={"gpus_per_worker": 1.5}), placement_timeout_s=3600)


def test_a_run_that_does_not_fit_is_refused_before_it_starts(cluster: None) -> None:
    with pytest.raises(PlacementError, match=r"asks for 4 GPUs, 4 of them on one node for worker 0"):
        Placement.reserve(config_of(rollout={"gpus_per_worker": 2, "tensor_parallel_size": 2}))
