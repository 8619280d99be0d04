"""Who is given up when a weight sync fails: workers are replaced, a teacher with half of it ends the run's attempt."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from common.collective import SyncError
from common.config import TeacherConfig
from learner.errors import ServiceLost
from learner.services import Services, Worker
from learner.teachers import Teacher
from tests.unit.test_stream import config_of


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
        services.teachers.all["live"] = Teacher("live", TeacherConfig(kind="self"), handle=answers(teacher))
    lost: list[int] = []
    services.pool.lose = lambda worker, why: lost.append(worker.number)
    return services, lost


async def test_a_whole_sync_gives_the_senders_report() -> None:
    services, lost = services_of("report", ["taken", "taken"], "taken")
    assert await services.publish(3) == "report"
    assert lost == []


async def test_workers_that_failed_are_given_up_and_the_failure_is_raised() -> None:
    services, lost = services_of(SyncError("a receiver is gone"), ["taken", SyncError("broke"), "taken"])
    with pytest.raises(SyncError, match="a receiver is gone"):
        await services.publish(3)
    assert lost == [1]


async def test_a_teacher_with_half_of_an_update_sends_the_run_back() -> None:
    services, lost = services_of(SyncError("a receiver is gone"), [SyncError("broke")], SyncError("half"))
    with pytest.raises(ServiceLost, match=r"teacher 'live' did not get all weights of version 3: half"):
        await services.publish(3)
    assert lost == [0]
