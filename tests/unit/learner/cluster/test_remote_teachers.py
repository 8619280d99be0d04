"""A teacher at a URL is asked before anything heavy starts: down, without a key, with a wrong key."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.protocol.scoring import TeacherError
from learner.cluster import teachers
from learner.cluster.teachers import FIRST_ANSWER_S, ask_remote_teachers
from teacher_server.backends.remote import model
from teacher_server.client import client
from tests.support.configs import config_of


async def test_a_teacher_that_is_down_is_one_line_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FIRST_ANSWER_S < 10
    monkeypatch.setattr(teachers, "FIRST_ANSWER_S", 0.5)
    with socket.socket() as closed:  # a port without a listener
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TeacherError) as error:
            await ask_remote_teachers(config_of(teacher={"url": url}))
    assert time.monotonic() - started < 5
    assert len(str(error.value).splitlines()) == 1
    assert url in str(error.value)
    assert "(last: Connect" in str(error.value)


async def test_an_endpoint_that_is_down_is_one_line_within_seconds(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray starts, and through the key of a further teacher too."""
    monkeypatch.setattr(model, "START_TIMEOUT_S", 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        teacher = {"model": str(tiny_model), "backend": "remote", "endpoint": address}
        for sections in ({"teacher": teacher}, {"teachers": {"big": teacher}}):
            with pytest.raises(TeacherError, match=f"the endpoint {address} did not answer .*ConnectError") as error:
                await ask_remote_teachers(config_of(**sections))
            assert len(str(error.value).splitlines()) == 1


async def test_a_run_that_starts_its_teacher_asks_none() -> None:
    await ask_remote_teachers(config_of())


@pytest.mark.parametrize(
    ("key", "says"),
    [(None, "wants a key: set teacher.client_key_file"), ("k", "does not know the key in teacher.client_key_file")],
)
async def test_a_missing_key_and_a_wrong_one_are_told_apart(
    key: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*_: Any, **__: Any) -> httpx.Response:
        return httpx.Response(401, json={"error": "unauthorised", "message": "send a valid key"})

    monkeypatch.setattr(client.Transport, "send", refused)
    teacher = {"url": "http://teacher:8000"}
    if key is not None:
        (tmp_path / "key").write_text(key)
        teacher["client_key_file"] = str(tmp_path / "key")
    with pytest.raises(TeacherError, match=rf"http://teacher:8000 {says}"):
        await ask_remote_teachers(config_of(teacher=teacher))
