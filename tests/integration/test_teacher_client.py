"""The client and the scorer against a real server, and what they do when it is lost, replaced, killed or drained."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import re
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray

from common.codec import encode_request
from common.config import TeacherConfig, TeacherServerConfig
from common.schema import (
    Context,
    Ids,
    ItemScore,
    Prompt,
    ScoreItem,
    ScoreResponse,
    TeacherInfo,
    Trajectory,
    as_ids,
    context_hash,
)
from common.scoring import ScoringError, TeacherError
from teacher_server.actor import TeacherActor
from teacher_server.client import TeacherClient, TeacherScorerFactory, handshake
from tests.teacher_oracle import Oracle, assert_score
from tests.teacher_running import KEYS, Running, free_port, items, post, process, request_of, running, tokens


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Iterator[Running]:
    with running(tiny_model, max_items=16) as server:
        yield server


def factory_for(teacher: Running, *contexts: Context, **changes: object) -> TeacherScorerFactory:
    return TeacherScorerFactory(
        **{
            "url": teacher.url,
            "run": "run",
            "expected_info": teacher.info,
            "contexts": contexts,
            "mode": "at_ids",
            "temperature": 1.0,
            "k": 8,
            "timeout_s": 30.0,
            "api_key": KEYS["red"],
            **changes,
        }
    )


def trajectory(item: ScoreItem, name: str = "sample") -> Trajectory:
    assert item.topk_ids is not None
    prompt = Prompt(row_id=name, student_ids=item.prompt_ids, teacher_ids=item.prompt_ids, context=item.context)
    zeros = np.zeros(item.response_ids.size, dtype=np.float32)
    return Trajectory(name, 0, prompt, item.response_ids, zeros, item.topk_ids, "length", ((0, 0),))


async def test_scorer_gives_the_teachers_scores_in_few_requests(teacher: Running, tiny_model: Path) -> None:
    oracle = Oracle.load(tiny_model)
    context = teacher.context(tokens(1, 30))
    scorer = pickle.loads(pickle.dumps(factory_for(teacher, context)))()
    batch = [items(n, 1, response=2 + n, context=context.hash if n % 2 else None)[0] for n in range(20)]
    results = await asyncio.gather(*(scorer.score(trajectory(item, f"{n}")) for n, item in enumerate(batch)))
    for n, (item, result) in enumerate(zip(batch, results, strict=True)):
        assert result.trajectory.sample_id == str(n)
        assert (result.model_fingerprint, result.teacher_version) == (teacher.info.model_fingerprint, 0)
        lead = context.ids if item.context else as_ids([])
        assert_score(result.score, oracle.logprobs(lead, item.prompt_ids, item.response_ids), item)
    await scorer.close()
    async with teacher.http("operator") as http:
        text = (await http.get("/metrics")).text
    assert 'opcd_teacher_requests_total{run="red/run",status="200"} 2.0' in text  # 20 answers, 16 items a request


async def test_a_large_request_shuts_nobody_out_and_the_projects_own_clients_send_none(tiny_model: Path) -> None:
    """Items of 14 tokens and a queue of 400: seven travel together, where many are asked for or end at one time."""
    with running(tiny_model, max_queued_tokens=400, batch_window_ms=0) as small:
        assert small.info.max_request_tokens == 100
        async with small.http() as http:
            refused = await post(http, request_of(items(1, 8)))
            assert (refused.status_code, refused.json()["error"]) == (413, "tokens")
            assert "8 items have 112 prompt and response tokens, at most 100" in refused.json()["message"]
            assert (await post(http, request_of(items(1, 1, response=600)))).status_code == 200
        client = TeacherClient(small.url, "client", 60, KEYS["red"])
        await client.info()
        response = await client.score(items(2, 20), "at_ids", 1.0, 8)
        assert [isinstance(result, ItemScore) for result in response.results] == 20 * [True]
        await client.close()
        scorer = factory_for(small, run="scorer")()
        await asyncio.gather(*(scorer.score(trajectory(item)) for item in items(3, 20)))
        await scorer.close()
        async with small.http("operator") as http:
            page = (await http.get("/metrics")).text
    for run in ("client", "scorer"):
        assert f'requests_total{{run="red/{run}",status="200"}} 3.0' in page
        assert f'requests_total{{run="red/{run}",status="413"}}' not in page


async def test_a_bad_sample_is_a_scoring_error_of_its_own(teacher: Running) -> None:
    scorer = factory_for(teacher)()
    good, bad = items(1, 2)
    bad = replace(bad, context="0" * 64)
    results = await asyncio.gather(
        scorer.score(trajectory(good)), scorer.score(trajectory(bad, "row-7")), return_exceptions=True
    )
    await scorer.close()
    assert not isinstance(results[0], BaseException)
    assert isinstance(results[1], ScoringError)
    assert "row-7" in str(results[1])
    assert "unknown_context" in str(results[1])


async def test_half_a_score_is_a_scoring_error_of_its_sample(teacher: Running) -> None:
    """As from a server of somebody else's, or of another version."""
    scorer = factory_for(teacher)()
    whole = scorer._client.score

    async def loses_a_row(*asked: object) -> ScoreResponse:
        response = await whole(*asked)
        first, second = response.results
        assert isinstance(first, ItemScore)
        return replace(response, results=(replace(first, tail_logprob=first.tail_logprob[1:]), second))

    scorer._client.score = loses_a_row
    one, other = items(1, 2)
    results = await asyncio.gather(
        scorer.score(trajectory(one, "row-7")), scorer.score(trajectory(other)), return_exceptions=True
    )
    await scorer.close()
    assert isinstance(results[0], ScoringError)
    assert "row-7: tail of shape (7,)" in str(results[0])
    assert not isinstance(results[1], BaseException)


async def test_lost_contexts_are_put_again(teacher: Running) -> None:
    """The server forgot parent and child; the caller does not notice."""
    root = teacher.context(tokens(2, 20))
    leaf = teacher.context(tokens(2, 50), root)
    client = TeacherClient(teacher.url, "run", 30, KEYS["red"])
    await client.put_context(root)
    await client.put_context(leaf)
    batch = [*items(1, 2, context=leaf.hash), *items(2, 2), *items(3, 1, context=root.hash)]
    before = await client.score(batch, "at_ids", 1.0, 8)
    teacher.service.contexts._contexts.clear()
    after = await client.score(batch, "at_ids", 1.0, 8)
    await client.close()
    for one, other in zip(before.results, after.results, strict=True):
        assert isinstance(one, ItemScore)
        assert isinstance(other, ItemScore)
        np.testing.assert_allclose(one.sampled_logprob, other.sampled_logprob, atol=1e-5)


async def test_another_model_stops_the_run(teacher: Running) -> None:
    expected = teacher.info.model_copy(update={"model_fingerprint": "ab" * 32})
    scorer = factory_for(teacher, expected_info=expected)()
    with pytest.raises(TeacherError, match="another model now") as caught:
        await scorer.score(trajectory(items(1, 1)[0]))
    await scorer.close()
    assert "\n" not in str(caught.value)


async def test_another_weight_version_stops_a_run_with_a_frozen_teacher(teacher: Running) -> None:
    expected = teacher.info.model_copy(update={"weight_version": 3})
    scorer = factory_for(teacher, expected_info=expected)()
    with pytest.raises(TeacherError, match="weight version 0"):
        await scorer.score(trajectory(items(1, 1)[0]))
    await scorer.close()


async def test_a_wrong_key_stops_the_run_and_is_not_shown(teacher: Running) -> None:
    factory = factory_for(teacher, api_key="secret-of-mine")
    assert "secret-of-mine" not in repr(factory)
    scorer = factory()
    with pytest.raises(TeacherError, match="401") as caught:
        await scorer.score(trajectory(items(1, 1)[0]))
    await scorer.close()
    assert "secret-of-mine" not in str(caught.value)


async def test_back_pressure_is_waited_out(tiny_model: Path) -> None:
    """A queue of a few items, a held backend, many requests: 429s on the way, an answer for everyone."""
    with running(tiny_model, max_queued_tokens=120, batch_tokens=16, batch_window_ms=0) as small:
        clients = [TeacherClient(small.url, f"run-{n % 2}", 60, KEYS["red"]) for n in range(8)]
        with small.gate.held():
            asked = [
                asyncio.create_task(client.score(items(n, 2), "at_ids", 1.0, 8)) for n, client in enumerate(clients)
            ]
            await asyncio.sleep(0.3)
        responses = await asyncio.gather(*asked)
        assert all(isinstance(result, ItemScore) for response in responses for result in response.results)
        async with small.http("operator") as http:
            text = (await http.get("/metrics")).text
        assert 'reason="busy"' in text
        for client in clients:
            await client.close()


async def test_a_teacher_that_is_not_there_is_one_clear_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    client = TeacherClient(url, "run", 600, lost_after_s=0.3)
    began = time.monotonic()
    with pytest.raises(TeacherError, match="out of reach") as caught:
        await client.info()
    assert time.monotonic() - began < 10
    await client.close()
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "teacher", "", "http://", "ftp://host", "http://host:port"])
def test_what_is_no_address_is_said_at_once(url: str) -> None:
    with pytest.raises(TeacherError, match=f"teacher.url '{url}' is no address"):
        TeacherClient(url, "run", 600)


async def test_a_deadline_is_kept(teacher: Running) -> None:
    client = TeacherClient(teacher.url, "run", 0.5, KEYS["red"])
    began = time.monotonic()
    with teacher.gate.held():
        with pytest.raises(TeacherError, match="request_timeout_s"):
            await client.score(items(1, 1), "at_ids", 1.0, 8)
        assert time.monotonic() - began < 5
    await client.close()


async def test_something_else_on_the_port() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = TeacherClient(f"http://127.0.0.1:{port}", "run", 5)
    with pytest.raises(TeacherError, match="does not answer as a teacher"):
        await client.info()
    await client.close()
    server.close()


@pytest.mark.parametrize(
    ("info", "asked", "says"),
    [
        ({"protocol": 9}, {}, "protocol 9"),
        ({"tokenizer_fingerprint": "cd" * 32}, {}, "another tokenizer"),
        ({"modes": {"sampled": None}}, {}, "cannot score in mode at_ids"),
        ({"modes": {"at_ids": (1.0,)}}, {"temperature": 0.7}, r"\[1.0\].*0.7"),
        ({}, {"k": 600}, "loss.top_k is 600.*at most 512"),
        ({}, {"longest_tokens": 5000}, "5000 tokens.*4096"),
    ],
)
def test_handshake(teacher: Running, info: dict[str, object], asked: dict[str, object], says: str) -> None:
    fits = {
        "tokenizer_fingerprint": teacher.info.tokenizer_fingerprint,
        "k": 256,
        "mode": "at_ids",
        "temperature": 1.0,
        "longest_tokens": 4096,
    }
    handshake(teacher.info, **fits)
    with pytest.raises(TeacherError, match=says):
        handshake(teacher.info.model_copy(update=info), **{**fits, **asked})


# --- processes ------------------------------------------------------------------------------------------------------


def large(count: int, context: str | None) -> list[ScoreItem]:
    return [items(n, 1, prompt=100, response=800, context=context)[0] for n in range(count)]


async def until_it_waits(url: str) -> None:
    """Until tokens wait in the teacher's queue, behind a batch that it has begun."""
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
    """Half a request on the way gets 503 `draining`, an idle connection is closed, a new one is refused."""
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
    with process(tiny_model, before="import teacher_server.serve as serving; serving.DRAIN_S = 0.5") as (server, url):
        client = TeacherClient(url, "run", 60, lost_after_s=0.1)
        asked = asyncio.create_task(client.score(large(60, None), "at_ids", 1.0, 8))
        await until_it_waits(url)
        server.send_signal(signal.SIGTERM)
        with pytest.raises(TeacherError, match="out of reach"):
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
    config = TeacherServerConfig(teacher=TeacherConfig(model=str(tiny_model), threads=1))
    actor = TeacherActor(config, api_key="mine")
    url = await asyncio.to_thread(actor.start)
    assert await asyncio.to_thread(actor.start) == url
    client, stranger = TeacherClient(url, "run", 10, "mine"), TeacherClient(url, "run", 10)
    assert (await client.info()).model == str(tiny_model)
    with pytest.raises(TeacherError, match="401"):
        await stranger.info()
    await client.close()
    await stranger.close()
    await asyncio.to_thread(actor.stop)
    with pytest.raises(httpx.TransportError):
        await asyncio.to_thread(httpx.get, url + "/healthz", trust_env=False)


class Breakable(TeacherActor):
    """An actor whose scheduler can be made to fail, as by an engine that dies."""

    def break_it(self) -> None:
        assert self._service is not None
        assert self._service._scheduler is not None

        def faulty(_: object) -> None:
            raise KeyError("a series that is not there")

        self._service._scheduler._on_batch = faulty


def test_an_actor_that_computes_nothing_any_more_dies(tiny_model: Path) -> None:
    """What `Teachers.watch` of a run waits for, to start it again: a `RayActorError` of `node_id`."""
    ray.init("local", num_cpus=1, log_to_driver=False, include_dashboard=False)
    try:
        config = TeacherServerConfig(teacher=TeacherConfig(model=str(tiny_model), threads=1))
        actor = ray.remote(Breakable).remote(config, KEYS["red"])
        url = ray.get(actor.start.remote())
        assert ray.get(actor.node_id.remote())
        ray.get(actor.break_it.remote())
        body, key = encode_request(request_of(items(1, 1))), {"Authorization": f"Bearer {KEYS['red']}"}
        with contextlib.suppress(httpx.TransportError):
            reply = httpx.post(f"{url}/v1/score", content=body, headers=key, trust_env=False, timeout=30)
            assert reply.status_code == 503

        def ask_for_a_while() -> None:
            for _ in range(300):
                ray.get(actor.node_id.remote(), timeout=30)
                time.sleep(0.1)

        with pytest.raises(ray.exceptions.RayActorError):
            ask_for_a_while()
    finally:
        ray.shutdown()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    actor = TeacherActor(TeacherServerConfig(teacher=TeacherConfig(model=str(tmp_path / "nothing"))))
    with pytest.raises(TeacherError, match=r"teacher.model .* cannot be loaded"):
        actor.start()


def test_a_port_that_is_taken(tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = TeacherConfig(model=str(tiny_model), port=port, threads=1)
        with pytest.raises(TeacherError, match=r"teacher.port"):
            TeacherActor(TeacherServerConfig(teacher=config)).start()
