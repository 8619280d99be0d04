"""Retries against a server that is down or asks to wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from common.protocol.scoring import TeacherError
from teacher_server.client.transport import Transport


@dataclass
class Answering:
    """A server that takes `seconds` for an answer, and records when."""

    seconds: float
    answers: Callable[[int], bytes] = lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    url: str = ""
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                number = len(self.began)
                self.began.append(time.monotonic())
                self.asked.set()
                await asyncio.sleep(self.seconds)
                self.ended.append(time.monotonic())
                writer.write(self.answers(number))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def up(server: Answering) -> AsyncIterator[Answering]:
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()


@asynccontextmanager
async def transport_to(url: str, *, timeout_s: float, breaker_open: bool = False) -> AsyncIterator[Transport]:
    transport = Transport(url, timeout_s=timeout_s, lost_after_s=60)
    for _ in range(transport.breaker.threshold if breaker_open else 0):
        transport.breaker.record_failure()
    try:
        yield transport
    finally:
        await transport.close()


async def test_an_open_breaker_lets_one_probe_through_and_then_all_others() -> None:
    async with (
        up(Answering(0.2)) as server,
        transport_to(server.url, timeout_s=30, breaker_open=True) as transport,
    ):
        replies = await asyncio.gather(*(transport.send("GET", "/") for _ in range(20)))
        assert {reply.status_code for reply in replies} == {200}
        assert not transport.breaker.open
    others = server.began[1:]
    assert min(others) >= server.ended[0]  # only the probe
    first = min(server.ended[1:])
    assert sum(began < first for began in others) > 1  # the others at the same time, as fast as the machine is


async def test_a_call_that_waits_for_a_probe_keeps_its_deadline() -> None:
    async with up(Answering(30)) as server, transport_to(server.url, timeout_s=30, breaker_open=True) as transport:
        probing = asyncio.create_task(transport.send("GET", "/probe"))
        await asyncio.wait_for(server.asked.wait(), 10)
        transport.timeout_s = 0.3
        began = time.monotonic()
        with pytest.raises(TeacherError, match="no time left while another request probed"):
            await transport.send("GET", "/waits")
        assert time.monotonic() - began < 5
        assert len(server.began) == 1
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)


@pytest.mark.parametrize("draw", [0.0, 1.0])
async def test_no_retry_comes_before_retry_after(monkeypatch: pytest.MonkeyPatch, draw: float) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: low + draw * (high - low))
    busy = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0.4\r\nContent-Length: 0\r\n\r\n"
    fine = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    server = Answering(0.0, lambda number: fine if number else busy)
    async with up(server), transport_to(server.url, timeout_s=30) as transport:
        assert (await transport.send("GET", "/")).status_code == 200
    first, second = server.began
    assert second - first >= 0.4
