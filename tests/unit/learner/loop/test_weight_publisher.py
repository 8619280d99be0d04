"""What becomes of whom when a weight sync fails, and that nobody takes part in one who was not measured before."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from common.config.model import TeacherConfig
from common.weight_sync.collective import SyncError
from learner.cluster.services import Services, Worker
from learner.cluster.teachers import Teacher
from learner.errors import ServiceLost
from learner.loop.weight_publisher import WeightPublisher
from tests.support.stub_loop import config_of


def answers(result: Any) -> Any:
    """An actor whose every call gives `result`, or raises it."""
    done: Future[Any] = Future()
    if isinstance(result, BaseException):
        done.set_exception(result)
    else:
        done.set_result(result)
    method = SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: done))
    return SimpleNamespace(publish=method, receive_weights=method)


def services_of(rank: Any, workers: list[Any], teacher: Any = None) -> tuple[Services, list[int]]:
    services = Services(config_of())
    services.ranks = [answers(rank)]
    services.group = [Worker(number, number, answers(result)) for number, result in enumerate(workers)]
    if teacher is not None:
        services.teachers.all["live"] = Teacher("live", TeacherConfig(kind="live"), handle=answers(teacher))
    lost: list[int] = []
    services.pool.lose = lambda worker, why: lost.append(worker.number)
    return services, lost


async def test_a_whole_sync_gives_the_senders_report() -> None:
    services, lost = services_of("report", ["taken", "taken"], "taken")
    assert await services.publish(3) == "report"
    assert lost == []


async def test_a_dead_worker_is_given_up_and_one_that_lives_takes_the_version_again() -> None:
    dead = ray.exceptions.RayActorError()
    services, lost = services_of(SyncError("a receiver is gone"), ["taken", SyncError("broke"), dead])
    with pytest.raises(SyncError, match="a receiver is gone"):
        await services.publish(3)
    assert lost == [2]
    assert services.group == []  # it was left: the next sync forms one anew


async def test_a_teacher_with_half_of_an_update_sends_the_run_back() -> None:
    services, lost = services_of(SyncError("a receiver is gone"), [SyncError("broke")], SyncError("half"))
    with pytest.raises(ServiceLost, match=r"teacher 'live' did not get all weights of version 3: half"):
        await services.publish(3)
    assert lost == []


async def test_a_replacement_that_gets_ready_while_others_are_measured_waits_for_the_next_sync() -> None:
    member, first, late = (Worker(number, number, None) for number in range(3))
    pool = SimpleNamespace(members=[member], ready=[first], failures=0, admit=lambda worker: pool.ready.remove(worker))
    sequences = [np.zeros(4, np.float32)]

    async def probe_engines(workers: list[Worker], probe: Any) -> list[Any]:
        if late not in pool.ready and pool.ready:
            pool.ready.append(late)
        return [sequences for _ in workers]

    async def open_sync(workers: list[Worker]) -> None:
        services.group = list(workers)

    async def nothing(*_: Any) -> Any:
        return sequences

    services: Any = SimpleNamespace(pool=pool, group=[], learner_info=SimpleNamespace(dtype="float32"))
    services.probe_engines, services.open_sync = probe_engines, open_sync
    services.probe_learner = services.publish = nothing
    publisher = WeightPublisher(config_of(), services, status=print)
    publisher._learner_at_0 = sequences
    await publisher.publish(1)
    assert services.group == [member, first]
    assert pool.ready == [late]
    assert [(span.stage, span.args) for span in publisher.take_spans()] == [
        ("sync", {"version": 1}),
        ("parity", {"version": 1}),
    ]
    await publisher.publish(1, again=True)  # as a resumed run does: it ends no step
    assert {str(span.args) for span in publisher.take_spans()} == {"{'version_again': 1}"}
