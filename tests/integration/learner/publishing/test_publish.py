"""A partitioned learner of Ray actors publishes to a real receiver; a failed sync leaves the ranks in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest
from common.weight_sync.receiver import Receiver, open_receiver
from learner.cluster.rank import LearnerRank
from learner.trainer.reports import StepReport
from tests.support.learner_oracle import expected_change, expected_gradients, relative_difference, weights_of
from tests.support.learner_ranks import smooth_config, totals
from tests.support.scored import make_scored
from tests.support.weight_groups import same

SOON_S = 60
"""Far below the timeout of ranks that wait for each other."""


@dataclass
class Partitioned:
    """Two ranks at ZeRO stage 3, one actor each."""

    config: Config
    actors: list[Any]
    plan: SyncManifest

    def call(self, method: str, *args: Any) -> list[Any]:
        """Return value or error of each rank."""

        def result(ref: Any) -> Any:
            try:
                return ray.get(ref, timeout=SOON_S)
            except (SyncError, RuntimeError) as error:
                return error

        return [result(ref) for ref in [getattr(actor, method).remote(*args) for actor in self.actors]]

    def step(self, scored: list[ScoredTrajectory]) -> list[StepReport]:
        shares = [scored[rank::2] for rank in range(2)]
        calls = [
            actor.accumulate.remote([(0.0, "train")] * len(x), *x) for actor, x in zip(self.actors, shares, strict=True)
        ]
        ray.get(calls, timeout=SOON_S)
        return self.call("finish_step", *totals(scored))

    def publish(self, receive: Callable[[Receiver], Any]) -> tuple[list[Any], Any]:
        """One sync in a new group: (results of the ranks, result or SyncError of `receive`)."""
        host, port = ray.get(self.actors[0].address.remote())
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(open_receiver, self.config.sync, host, port, 1, 2, "cpu")
            assert self.call("open_sync", host, port, 2) == [None, None]
            receiver = joining.result()
            received = pool.submit(receive, receiver)
            results = self.call("publish")
            try:
                return results, received.result()
            except SyncError as error:
                return results, error
            finally:
                receiver.close()


@pytest.fixture(scope="module")
def partitioned(cluster: None, tiny_model: Path) -> Iterator[Partitioned]:
    # Buckets smaller than the embedding: many groups to gather.
    config = smooth_config(tiny_model, 3, learner={"ranks": 2}, sync={"bucket_bytes": 40_000})
    actor = ray.remote(LearnerRank)
    actors = [actor.options(num_cpus=0).remote(rank, 2, config) for rank in range(2)]
    host, port = ray.get(actors[0].address.remote())
    info, _ = ray.get([one.setup.remote(host, port) for one in actors])
    yield Partitioned(config, actors, SyncManifest(info.tensors, config.sync.bucket_bytes))
    for one in actors:
        ray.kill(one)


def everything(plan: SyncManifest) -> Callable[[Receiver], dict[str, Tensor]]:
    return lambda receiver: {name: tensor.clone() for name, tensor in receiver.receive(plan)}


def test_whole_weights_arrive_from_a_partitioned_learner(partitioned: Partitioned, tmp_path: Path) -> None:
    scored = make_scored(4)
    before = weights_of(partitioned.config.student.model)
    reports = partitioned.step(scored)
    (sent, helped), received = partitioned.publish(everything(partitioned.plan.at(reports[0].weight_version)))
    assert helped is None
    assert sent.bytes == partitioned.plan.nbytes
    assert list(received) == [spec.name for spec in partitioned.plan.tensors]
    change = {name: received[name] - before[name] for name in received}
    expected = expected_change(partitioned.config, expected_gradients(partitioned.config, scored))
    assert relative_difference(change, {name: expected[name] for name in change}) < 1e-5
    assert partitioned.call("save", str(tmp_path / "out")) == [None, None]
    saved = weights_of(tmp_path / "out")
    assert same(received, {name: saved[name] for name in received})


def quits(plan: SyncManifest) -> Callable[[Receiver], None]:
    def receive(receiver: Receiver) -> None:
        stream = receiver.receive(plan)
        next(stream)
        stream.close()

    return receive


def refuses(plan: SyncManifest) -> Callable[[Receiver], Any]:
    return everything(SyncManifest(plan.tensors, plan.bucket_bytes + 1, plan.version))


@pytest.mark.parametrize("breaks", [quits, refuses])
def test_a_sync_that_breaks_leaves_the_ranks_together(
    partitioned: Partitioned, breaks: Callable[[SyncManifest], Callable[[Receiver], Any]]
) -> None:
    version = partitioned.step(make_scored(2))[0].weight_version
    (sent, helped), _ = partitioned.publish(breaks(partitioned.plan.at(version)))
    assert isinstance(sent, SyncError)
    assert helped is None
    (report, _) = partitioned.step(make_scored(3))
    assert report.applied
    assert report.weight_version == version + 1
    (sent, helped), received = partitioned.publish(everything(partitioned.plan.at(version + 1)))
    assert sent.bytes == partitioned.plan.nbytes
    assert len(received) == len(partitioned.plan.tensors)
