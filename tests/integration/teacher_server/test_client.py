"""Client and scorer against a real server: scores, refusals, and a server that is lost or replaced."""

from __future__ import annotations

import asyncio
import pickle
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.protocol.schema import (
    Context,
    ItemScore,
    ScoreItem,
    ScoreResponse,
    Trajectory,
    as_ids,
)
from common.protocol.scoring import ScoringError, TeacherError
from teacher_server.client import TeacherClient, TeacherScorerFactory, handshake
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import KEYS, Running, items, post, request_of, running, tokens, trajectory


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


async def test_large_requests_are_refused_and_this_client_sends_none(tiny_model: Path) -> None:
    """Items that count as 16 tokens, requests of at most 112: client and scorer send seven items in a request."""
    with running(tiny_model, max_queued_tokens=448, batch_window_ms=0) as small:
        assert small.info.max_request_tokens == 112
        async with small.http() as http:
            refused = await post(http, request_of(items(1, 8)))
            assert (refused.status_code, refused.json()["error"]) == (413, "tokens")
            assert "8 items have 128 prompt and response tokens" in refused.json()["message"]
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


async def test_a_bad_sample_fails_alone(teacher: Running) -> None:
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


async def test_an_incomplete_score_is_a_scoring_error_of_its_sample(
    teacher: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A foreign server, or one of another version, could send it."""
    score = TeacherClient.score

    async def score_without_a_row(*arguments: Any) -> ScoreResponse:
        response = await score(*arguments)
        first, second = response.results
        assert isinstance(first, ItemScore)
        return replace(response, results=(replace(first, tail_logprob=first.tail_logprob[1:]), second))

    monkeypatch.setattr(TeacherClient, "score", score_without_a_row)
    scorer = factory_for(teacher)()
    one, other = items(1, 2)
    results = await asyncio.gather(
        scorer.score(trajectory(one, "row-7")), scorer.score(trajectory(other)), return_exceptions=True
    )
    await scorer.close()
    assert isinstance(results[0], ScoringError)
    assert "row-7: tail of shape (7,)" in str(results[0])
    assert not isinstance(results[1], BaseException)


async def test_evicted_contexts_are_put_again(teacher: Running) -> None:
    """The server evicted parent and child; the caller gets scores all the same."""
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


def own_items(teacher: Running, count: int, parent: Context, samples: int = 3) -> list[tuple[Context, Trajectory]]:
    """`samples` answers to each of `count` prompts with their own contexts under `parent`."""
    found = []
    for n in range(count):
        context = teacher.context(np.concatenate([parent.ids, tokens(100 + n, 20)]), parent)
        for item in items(n, samples, context=context.hash):
            one = trajectory(item)
            found.append((context, replace(one, prompt=replace(one.prompt, own_context=context))))
    return found


async def test_contexts_of_rows_are_put_with_their_first_score_and_then_forgotten(tiny_model: Path) -> None:
    """Scores equal those of a plain model; the parent is computed once, and each context once for its three answers."""
    oracle = Oracle.load(tiny_model)
    with running(tiny_model) as server:
        parent = server.context(tokens(7, 30))
        scorer = factory_for(server, parent)()
        batch = own_items(server, 5, parent)
        results = await asyncio.gather(*(scorer.score(one) for _, one in batch))
        for (context, one), result in zip(batch, results, strict=True):
            prompt = one.prompt
            assert_score(
                result.score,
                oracle.logprobs(context.ids, prompt.teacher_ids, one.response_ids),
                ScoreItem(context.hash, prompt.teacher_ids, one.response_ids, one.topk_ids),
            )
        assert set(scorer._client._contexts) == {parent.hash}
        assert not scorer._held._users
        await scorer.close()
        async with server.http("operator") as http:
            page = (await http.get("/metrics")).text
    assert server.service.contexts.get("red", batch[0][0].hash).parent == parent.hash
    assert f'opcd_teacher_context_tokens_computed_total{{run="red/run"}} {30 + 5 * 20:.1f}' in page


async def test_a_rows_context_that_the_server_evicts_is_put_again_while_a_score_needs_it(teacher: Running) -> None:
    parent = teacher.context(tokens(8, 30))
    scorer = factory_for(teacher, parent)()
    ((_, one),) = own_items(teacher, 1, parent, samples=1)
    before = await scorer.score(one)
    teacher.service.contexts._contexts.clear()
    after = await scorer.score(one)
    await scorer.close()
    np.testing.assert_allclose(before.score.sampled_logprob, after.score.sampled_logprob, atol=1e-5)


async def test_a_rows_context_that_is_too_long_fails_its_sample_alone(teacher: Running) -> None:
    parent = teacher.context(tokens(9, 30))
    scorer = factory_for(teacher, parent)()
    ((_, good),) = own_items(teacher, 1, parent, samples=1)
    long = teacher.context(tokens(10, 5000))
    bad = replace(good, prompt=replace(good.prompt, context=long.hash, own_context=long))
    results = await asyncio.gather(scorer.score(bad), scorer.score(good), return_exceptions=True)
    await scorer.close()
    assert isinstance(results[0], ScoringError)
    assert "at most 4095 tokens" in str(results[0])
    assert not isinstance(results[1], BaseException)


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
    with pytest.raises(TeacherError, match="does not know the key") as caught:
        await scorer.score(trajectory(items(1, 1)[0]))
    await scorer.close()
    assert "secret-of-mine" not in str(caught.value)


async def test_clients_wait_out_back_pressure(tiny_model: Path) -> None:
    """A short queue, a held backend and many requests: some get 429, all get scores."""
    with running(tiny_model, max_queued_tokens=128, batch_tokens=16, batch_window_ms=0) as small:
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


async def test_an_unreachable_teacher_is_an_error_of_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    client = TeacherClient(url, "run", 600, lost_after_s=0.3)
    began = time.monotonic()
    with pytest.raises(TeacherError, match="unreachable for") as caught:
        await client.info()
    assert time.monotonic() - began < 10
    await client.close()
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "teacher", "", "http://", "ftp://host", "http://host:port"])
def test_an_invalid_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(TeacherError, match=f"teacher.url '{url}' is not an address"):
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
        ({}, {"added_tokens": {9999: "<new>"}}, "token id 9999 is '<new>' for the student and does not exist"),
        ({"modes": {"sampled": None}}, {}, "cannot score in mode at_ids"),
        ({"modes": {"at_ids": (1.0,)}}, {"temperature": 0.7}, r"\[1.0\].*0.7"),
        ({}, {"k": 600}, "loss.top_k is 600.*at most 512"),
        ({}, {"longest_tokens": 5000}, "5000 tokens.*4096"),
    ],
)
def test_handshake(teacher: Running, info: dict[str, object], asked: dict[str, object], says: str) -> None:
    fits = {
        "tokenizer_fingerprint": teacher.info.tokenizer_fingerprint,
        "added_tokens": teacher.info.added_tokens,
        "k": 256,
        "mode": "at_ids",
        "temperature": 1.0,
        "longest_tokens": 4096,
    }
    handshake(teacher.info, **fits)
    with pytest.raises(TeacherError, match=says):
        handshake(teacher.info.model_copy(update=info), **{**fits, **asked})
