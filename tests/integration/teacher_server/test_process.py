"""The teacher as a process or an actor: drained, killed, restarted, and with a start that fails."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest
import ray

from common.config.model import TeacherConfig
from common.protocol.codec import encode_request
from common.protocol.schema import (
    Context,
    Ids,
    ItemScore,
    ScoreItem,
    TeacherInfo,
    context_hash,
)
from common.protocol.scoring import TeacherError
from teacher_server.actor import TeacherActor
from teacher_server.backends.base import BackendLost
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.client import TeacherClient, TeacherScorerFactory
from tests.support.processes import free_port
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import KEYS, items, process, request_of, tokens, trajectory


def large(count: int, context: str | None) -> list[ScoreItem]:
    return [items(n, 1, prompt=100, response=800, context=context)[0] for n in range(count)]


async def until_it_waits(url: str) -> None:
    """Wait until tokens wait in the teacher's queue behind a running batch."""
    async with httpx.AsyncClient() as plain:
        for _ in range(2000):
            series = (await plain.get(f"{url}/metrics")).text
            if re.search(r"^opcd_teacher_queued_tokens [1-9]", series, re.MULTILINE):
                return
            await asyncio.sleep(0.005)
    raise AssertionError("nothing waited within 10 s")


def context_of(info: TeacherInfo, ids: Ids) -> Context:
    return Context(context_hash(info.tokenizer_fingerprint, ids), ids)


async def test_sigterm_finishes_what_was_begun_and_exits_0(tiny_model: Path) -> None:
    with process(tiny_model) as (server, url):
        client = TeacherClient(url, "run", 60)
        asked = asyncio.create_task(client.score(large(24, None), "at_ids", 1.0, 8))
        await until_it_waits(url)
        server.send_signal(signal.SIGTERM)
        assert not asked.done()
        response = await asked
        assert all(isinstance(result, ItemScore) for result in response.results)
        assert await asyncio.to_thread(server.wait, 30) == 0
        await client.close()


async def test_intake_ends_with_the_signal_while_what_was_begun_is_finished(tiny_model: Path) -> None:
    """A half-sent request gets 503 `draining`, an idle connection is closed, a new connection is refused."""
    body = encode_request(request_of(items(1, 1)))
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with process(tiny_model) as (server, url):
        client = TeacherClient(url, "run", 60)
        asked = asyncio.create_task(client.score(large(24, None), "at_ids", 1.0, 8))
        await until_it_waits(url)
        port = int(url.rpartition(":")[2])
        half, idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        half[1].write(head + body[:10])
        idle[1].write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await idle[0].readline()).startswith(b"HTTP/1.1 200")
        server.send_signal(signal.SIGTERM)
        await asyncio.wait_for(idle[0].read(), 10)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        half[1].write(body[10:])
        answer = await asyncio.wait_for(half[0].read(), 10)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"error":"draining"' in answer
        assert not asked.done()
        assert all(isinstance(result, ItemScore) for result in (await asked).results)
        assert await asyncio.to_thread(server.wait, 30) == 0
        for _, writer in (half, idle):
            writer.close()
        await client.close()


async def test_a_drain_that_drops_work_does_not_exit_0(tiny_model: Path) -> None:
    with process(tiny_model, before="import teacher_server.http.serve as serving; serving.DRAIN_S = 0.5") as (
        server,
        url,
    ):
        client = TeacherClient(url, "run", 60, lost_after_s=0.1)
        asked = asyncio.create_task(client.score(large(60, None), "at_ids", 1.0, 8))
        await until_it_waits(url)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(TeacherError, match="unreachable for"):
            await asked
        assert await asyncio.to_thread(server.wait, 60) == 1
        await client.close()


async def test_killed_in_mid_batch_and_started_again(tiny_model: Path) -> None:
    """The run goes on: the scorer connects again, puts its context again, and every answer gets the right score."""
    port = free_port()
    ids = tokens(3, 60)
    with process(tiny_model, port) as (server, url):
        client = TeacherClient(url, "run", 120)
        info = await client.info()
        context = context_of(info, ids)
        scorer = TeacherScorerFactory(url, "run", info, (context,), "at_ids", 1.0, 8, timeout_s=120)()
        await scorer.score(trajectory(items(0, 1, context=context.hash)[0]))  # the context is there now
        batch = large(12, context.hash)
        asked = [asyncio.create_task(scorer.score(trajectory(item, f"{n}"))) for n, item in enumerate(batch)]
        await until_it_waits(url)
        assert not any(task.done() for task in asked)
        server.kill()
        server.wait()
    with process(tiny_model, port):
        results = await asyncio.gather(*asked)
        after = await client.info()
        await client.close()
        await scorer.close()
    oracle = Oracle.load(tiny_model)
    assert after.model_fingerprint == info.model_fingerprint
    for item, result in zip(batch, results, strict=True):
        assert result.model_fingerprint == info.model_fingerprint
        assert result.trajectory.response_ids is item.response_ids
    for item, result in zip(batch[:2], results, strict=False):
        assert_score(result.score, oracle.logprobs(ids, item.prompt_ids, item.response_ids), item)


async def test_actor_starts_and_stops(tiny_model: Path) -> None:
    config = TeacherConfig(model=str(tiny_model), threads=1)
    actor = TeacherActor(config, api_key="mine")
    url = await asyncio.to_thread(actor.start)
    assert await asyncio.to_thread(actor.start) == url
    client, stranger = TeacherClient(url, "run", 10, "mine"), TeacherClient(url, "run", 10)
    assert (await client.info()).model == str(tiny_model)
    with pytest.raises(TeacherError, match="wants a key"):
        await stranger.info()
    await client.close()
    await stranger.close()
    await asyncio.to_thread(actor.stop)
    with pytest.raises(httpx.TransportError):
        await asyncio.to_thread(httpx.get, url + "/healthz", trust_env=False)


class Breakable(TeacherActor):
    """An actor whose backend can be made to die."""

    def break_it(self) -> None:
        def dies(*_: object) -> None:
            raise BackendLost("the engine died")

        TransformersBackend.score = TransformersBackend.restart = dies


def test_a_broken_actor_dies(tiny_model: Path) -> None:
    """`node_id` raises RayActorError: `Teachers.watch` of a run waits for this and starts another actor."""
    ray.init("local", num_cpus=1, log_to_driver=False, include_dashboard=False)
    try:
        config = TeacherConfig(model=str(tiny_model), threads=1)
        actor = ray.remote(Breakable).remote(config, KEYS["red"])
        url = ray.get(actor.start.remote())
        assert ray.get(actor.node_id.remote())
        ray.get(actor.break_it.remote())
        body, key = encode_request(request_of(items(1, 1))), {"Authorization": f"Bearer {KEYS['red']}"}
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(f"{url}/v1/score", content=body, headers=key, trust_env=False, timeout=300)
            assert reply.status_code == 503

        def ask_for_a_while() -> None:
            for _ in range(300):
                ray.get(actor.node_id.remote(), timeout=300)
                time.sleep(0.1)

        with pytest.raises(ray.exceptions.RayActorError):
            ask_for_a_while()
    finally:
        ray.shutdown()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    actor = TeacherActor(TeacherConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(TeacherError, match=r"teacher.model .* cannot be loaded"):
        actor.start()


def test_a_port_that_is_taken(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = TeacherConfig(model=str(tiny_model), port=port, threads=1)
        with pytest.raises(TeacherError, match=r"teacher.port"):
            TeacherActor(config).start()
