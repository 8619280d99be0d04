"""Ranks, teachers and nodes that die, as real actors of a real cluster: the run restarts from its last checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learner.cluster.placement import Placement
from learner.cluster.services import Services
from learner.cluster.teachers import Teacher, Teachers
from learner.errors import ServiceLost
from learner.loop.checkpoints import Checkpoints, Manifest
from learner.loop.run import user_facing_error
from learner.loop.user_errors import unwrap_ray_error
from tests.support.processes import free_port
from tests.support.stub_loop import config_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # A dead node is noticed after a second instead of a quarter of a minute.
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Rank:
    """A rank without a model. It computes torch's all_reduce over gloo with the other rank, as a real one does."""

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def join(self, rank: int, port: int) -> None:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def reduce(self, dies: bool) -> None:
        import torch
        import torch.distributed as dist

        if dies:
            os._exit(1)
        dist.all_reduce(torch.ones(4))

    def save_state(self, folder: str, drop_step: bool) -> None:
        self.reduce(dies=False)

    def fail(self) -> None:
        raise RuntimeError("the loss is no number")


def services_with(ranks: list[Any]) -> Services:
    services = Services(config_of())
    services.ranks = ranks
    return services


@pytest.fixture
def ranks(cluster: Cluster) -> Iterator[list[Any]]:
    ranks = [ray.remote(Rank).options(num_cpus=0).remote() for _ in range(2)]
    port = free_port()
    ray.get([rank.join.remote(index, port) for index, rank in enumerate(ranks)], timeout=120)
    yield ranks
    for rank in ranks:
        ray.kill(rank)


async def test_a_rank_that_dies_in_a_collective_is_lost_whoever_speaks_first(ranks: list[Any]) -> None:
    survivor, _ = ranks[0].reduce.remote(False), ranks[1].reduce.remote(True)
    with pytest.raises(RuntimeError) as raised:
        await survivor
    assert isinstance(raised.value, ray.exceptions.RayTaskError)  # of gloo: no word of a dead rank
    assert unwrap_ray_error(raised.value) is raised.value
    found = await user_facing_error(raised.value, services_with(ranks))
    assert isinstance(found, ServiceLost)
    assert "rank 1 of 2 of the learner died" in str(found)


async def test_what_a_rank_raises_by_itself_stays_what_it_is(ranks: list[Any]) -> None:
    with pytest.raises(RuntimeError) as raised:
        await ranks[0].fail.remote()
    assert await user_facing_error(raised.value, services_with(ranks)) is raised.value


async def test_a_rank_that_dies_while_the_state_is_written_is_no_full_disk(
    ranks: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = services_with(ranks)

    async def save_state(folder: str, *, drop_step: bool) -> None:
        await ranks[0].save_state.remote(folder, drop_step)  # its error is the first to arrive

    monkeypatch.setattr(services, "save_state", save_state)
    manifest = Manifest.model_construct(step=1)
    ranks[1].reduce.remote(True)
    with pytest.raises(ServiceLost, match="rank 1 of 2"):
        await Checkpoints(tmp_path, keep=1).write(manifest, services)


def head() -> str:
    """Id of the node that no test removes."""
    return str(ray.get_runtime_context().get_node_id())


# --- nodes -----------------------------------------------------------------------------------------------------------


class Maker:
    """A worker: its answers lie in its node's object store."""

    def make(self) -> tuple[str, bytes]:
        return "made", b"x" * 1_000_000


class Taker:
    """A rank, which gets an answer by reference."""

    def take(self, answer: bytes) -> int:
        return len(answer)


async def test_answers_that_a_node_took_with_it_send_the_run_back(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1, resources={"far": 1})
    maker = ray.remote(Maker).options(num_cpus=0, resources={"far": 1}).remote()
    made, answer = maker.make.options(num_returns=2).remote()
    assert await made == "made"
    cluster.remove_node(node, allow_graceful=False)
    here = NodeAffinitySchedulingStrategy(head(), soft=False)
    taker = ray.remote(Taker).options(num_cpus=0, scheduling_strategy=here).remote()
    with pytest.raises(ray.exceptions.RayError) as raised:
        await taker.take.remote(answer)
    found = unwrap_ray_error(raised.value)
    assert isinstance(found, ServiceLost)
    assert str(found).startswith("a node is gone, and answers of this step with it")


class StubTeacher:
    """Comes up at an address that contains its process id."""

    def __init__(self, *_: Any) -> None:
        pass

    def start(self, on_cluster: bool = False) -> str:
        return f"http://here:{os.getpid()}"

    def node_id(self) -> str:
        return ray.get_runtime_context().get_node_id()


class OnNode(Placement):
    """Places every actor on one node."""

    def __init__(self, node: str) -> None:
        super().__init__([])
        self._node = node

    def options(self, name: str) -> dict[str, Any]:
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(self._node, soft=False)}


@pytest.fixture
def teachers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Teachers:
    monkeypatch.setattr("learner.cluster.teachers.TeacherActor", StubTeacher)
    monkeypatch.setattr("learner.cluster.teachers.WATCH_EVERY_S", 0.2)
    return Teachers(config_of())


async def placed(teachers: Teachers, node: str) -> Teacher:
    teachers.begin(OnNode(node))
    (teacher,) = teachers.all.values()
    teacher.url = await teacher.started
    teacher.node = await teacher.handle.node_id.remote()
    return teacher


async def test_a_teacher_whose_node_is_gone_sends_the_run_back(cluster: Cluster, teachers: Teachers) -> None:
    node = cluster.add_node(num_cpus=1)
    teacher = await placed(teachers, node.node_id)
    assert teacher.node == node.node_id
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ServiceLost, match=r"teacher 'default' died and cannot be started again on its node"):
        await teachers.watch()


async def test_a_teacher_that_comes_up_elsewhere_sends_the_run_back(teachers: Teachers) -> None:
    teacher = await placed(teachers, head())
    url = teacher.url
    ray.kill(teacher.handle)
    with pytest.raises(ServiceLost, match=rf"died and came up at http://here:\d+; scorers look for it at {url}"):
        await teachers.watch()
    ray.kill(teacher.handle)


async def test_a_teacher_that_does_not_come_up_in_time_sends_the_run_back(
    teachers: Teachers, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = await placed(teachers, head())
    monkeypatch.setattr("learner.cluster.teachers.START_TIMEOUT_S", 0.01)
    ray.kill(teacher.handle)
    with pytest.raises(ServiceLost, match=r"cannot be started again on its node: it was not up within 0 s"):
        await teachers.watch()
    ray.kill(teacher.handle)
