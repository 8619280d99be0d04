"""The whole teacher over HTTP on loopback: a real server, a tiny real model, and the oracle in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import msgpack
import pytest

from common.protocol.codec import encode_context, encode_request
from common.protocol.schema import ItemError, ItemScore, ScoreRequest, as_ids
from teacher_server.backends.base import BackendLost
from teacher_server.client import TeacherClient
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import KEYS, Running, items, post, put, request_of, running, scored, tokens


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Iterator[Running]:
    with running(tiny_model, max_items=64, max_body_bytes=4 * 1024 * 1024) as server:
        yield server


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Oracle:
    return Oracle.load(tiny_model)


# --- scores ---------------------------------------------------------------------------------------------------------


async def test_scores_are_a_plain_forward_pass(teacher: Running, oracle: Oracle) -> None:
    """With and without context, with a parent, mixed lengths, cold and warm cache."""
    root = teacher.context(tokens(1, 40))
    leaf = teacher.context(tokens(1, 90), root)
    assert (leaf.ids[:40] == root.ids).all()
    by_name = {None: as_ids([]), root.hash: root.ids, leaf.hash: leaf.ids}
    batch = [
        *items(1, 3, context=leaf.hash),
        *items(2, 2, prompt=30, response=1, context=root.hash),
        *items(3, 2, prompt=1, response=50),
        *items(4, 1, prompt=0, response=5, context=leaf.hash),
        *items(5, 1, response=0),
    ]
    client = TeacherClient(teacher.url, "run", 30, KEYS["red"])
    await client.put_context(root)
    await client.put_context(leaf)
    for _ in ("cold", "warm"):
        response = await client.score(batch, "at_ids", 1.0, 8)
        assert response.model_fingerprint == teacher.info.model_fingerprint
        for item, result in zip(batch, response.results, strict=True):
            assert isinstance(result, ItemScore)
            if item.response_ids.size:
                assert_score(result, oracle.logprobs(by_name[item.context], item.prompt_ids, item.response_ids), item)
    await client.close()


async def test_many_at_once_each_gets_its_own(teacher: Running, oracle: Oracle) -> None:
    context = teacher.context(tokens(2, 33))
    async with teacher.http() as http:
        await put(http, context)
        batches = [items(seed, 1 + seed % 3, response=1 + seed, context=context.hash) for seed in range(24)]
        responses = await asyncio.gather(*(scored(http, batch, run=f"run-{n % 3}") for n, batch in enumerate(batches)))
    for batch, response in zip(batches, responses, strict=True):
        for item, result in zip(batch, response.results, strict=True):
            assert isinstance(result, ItemScore)
            assert_score(result, oracle.logprobs(context.ids, item.prompt_ids, item.response_ids), item)


async def test_a_bad_item_leaves_the_others_answered(teacher: Running) -> None:
    good = items(1, 1)[0]
    bad = [
        (items(2, 1, context="0" * 64)[0], "unknown_context"),
        (items(3, 1, prompt=3000, response=1097)[0], "too_long"),
        (items(4, 1, prompt=0)[0], "bad_shape"),
    ]
    for item, code in bad:
        async with teacher.http() as http:
            first, second, third = (await scored(http, [good, item, good])).results
        assert isinstance(first, ItemScore)
        assert isinstance(second, ItemError)
        assert isinstance(third, ItemScore)
        assert (second.code, bool(second.message)) == (code, True)


async def test_ids_outside_the_vocabulary(teacher: Running) -> None:
    item = items(1, 1)[0]
    item.prompt_ids[0] = 512
    async with teacher.http() as http:
        (result,) = (await scored(http, [item])).results
    assert isinstance(result, ItemError)
    assert result.code == "bad_ids"
    assert "512" in result.message


async def test_a_backend_that_fails_takes_only_the_item_along(teacher: Running) -> None:
    poison = items(9, 1, response=13)[0]
    teacher.gate.fails = lambda batch: any(work.item.response_ids.size == 13 for work in batch)
    try:
        async with teacher.http() as http:
            first, second, third = (await scored(http, [*items(1, 1), poison, *items(2, 1)])).results
    finally:
        teacher.gate.fails = lambda _: False
    assert isinstance(first, ItemScore)
    assert isinstance(second, ItemError)
    assert second.code == "internal"
    assert isinstance(third, ItemScore)


async def test_a_broken_server_refuses_and_fails_its_checks(tiny_model: Path) -> None:
    with running(tiny_model) as broken:

        def engine_dies(*_: object) -> bool:
            raise BackendLost("the engine died")

        broken.gate.fails = broken.gate.restart = engine_dies
        async with broken.http() as http:
            for _ in ("meets the fault", "comes after it"):
                reply = await post(http, request_of(items(1, 1)))
                assert (reply.status_code, reply.json()["error"]) == (503, "broken")
                assert "the engine died" in reply.json()["message"]
            assert (await http.get("/readyz")).status_code == 503
            assert (await http.get("/healthz")).status_code == 503


# --- refusals of whole requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"temperature": 0.0}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"mode": "teacher_topk", "k": 0}, 400, "k"),
        ({"mode": "teacher_topk", "k": 10**6}, 400, "k"),
        ({"run": ""}, 400, "run"),
        ({"items": tuple(items(0, 65))}, 413, "items"),
    ],
)
async def test_requests_out_of_bounds(teacher: Running, change: dict[str, object], status: int, code: str) -> None:
    fields = {"request_id": "", "run": "run", "mode": "at_ids", "temperature": 1.0, "k": 8, "items": ()}
    async with teacher.http() as http:
        reply = await post(http, ScoreRequest(**{**fields, **change}))
    assert (reply.status_code, reply.json()["error"]) == (status, code)
    assert reply.json()["message"]


async def test_a_reply_that_would_be_too_large_is_refused_before_anything_is_computed(teacher: Running) -> None:
    """A request of kilobytes can ask for hundreds of megabytes of the teacher's top-k ids."""
    many = [replace(item, topk_ids=None) for item in items(0, 60, response=30)]
    request = request_of(many, mode="teacher_topk", k=512)
    assert len(encode_request(request)) < 20_000
    before = len(teacher.gate.batches)
    async with teacher.http() as http:
        reply = await post(http, request)
        assert (reply.status_code, reply.json()["error"]) == (413, "reply")
        assert "4194304" in reply.json()["message"]
        assert len(teacher.gate.batches) == before
    client = TeacherClient(teacher.url, "run", 30, KEYS["red"])
    await client.info()
    response = await client.score([*many, *many], "teacher_topk", 1.0, 512)  # cut by what replies take, and by number
    assert [isinstance(result, ItemScore) for result in response.results] == 120 * [True]
    await client.close()


async def test_a_request_without_items(teacher: Running) -> None:
    async with teacher.http() as http:
        assert (await scored(http, [])).results == ()


@pytest.mark.parametrize("body", [b"", b"{}", b"\x80", b"\xff" * 100])
async def test_bodies_that_are_no_message(teacher: Running, body: bytes) -> None:
    async with teacher.http() as http:
        for reply in (
            await http.post("/v1/score", content=body),
            await http.put(f"/v1/contexts/{'0' * 64}", content=body),
        ):
            assert (reply.status_code, reply.json()["error"]) == (400, "body")


async def test_a_body_that_is_too_large(teacher: Running) -> None:
    """Refused by its declared length before it is read, or as soon as it exceeds the limit."""

    async def endless() -> object:
        for _ in range(10_000):
            yield b"\0" * 65_536

    async with teacher.http() as http:
        declared = await http.post("/v1/score", content=b"\0" * (5 * 1024 * 1024))
        try:
            undeclared = await http.post("/v1/score", content=endless())
        except (httpx.ReadError, httpx.WriteError):  # the server closed while we were still sending
            undeclared = None
    assert declared.status_code == 413
    assert undeclared is None or undeclared.status_code == 413


async def test_contexts_are_checked(teacher: Running) -> None:
    context = teacher.context(tokens(3, 10))
    async with teacher.http() as http:
        wrong = await http.put(f"/v1/contexts/{'1' * 64}", content=b"")
        assert (wrong.status_code, wrong.json()["error"]) == (400, "body")
        other = await put(http, type(context)("1" * 64, context.ids))
        assert (other.status_code, other.json()["error"]) == (422, "hash_mismatch")
        named = await http.put("/v1/contexts/short", content=b"")
        assert (named.status_code, named.json()["error"]) == (422, "hash")
        orphan = await put(http, type(context)(context.hash, context.ids, "2" * 64))
        assert (orphan.status_code, orphan.json()["error"]) == (404, "unknown_parent")
        assert (await put(http, context)).json() == {"hash": context.hash, "tokens": 10}
        assert (await put(http, context)).status_code == 200


# --- tenants --------------------------------------------------------------------------------------------------------


async def test_paths_and_methods_that_are_not_there(teacher: Running) -> None:
    async with teacher.http() as http:
        for method, path, status, code in (
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", "/v1/info/", 404, "not_found"),
            ("DELETE", "/v1/score", 405, "method"),
        ):
            reply = await http.request(method, path)
            assert (reply.status_code, reply.json()["error"]) == (status, code)
        for path in ("/healthz", "/readyz"):
            assert (await http.head(path)).status_code == 200


async def test_a_refusal_repeats_little_of_the_body(teacher: Running) -> None:
    """Otherwise megabytes of a wrong mode come back, several times over, and nothing counts them."""
    fields = {"v": 1, "id": "", "run": "r", "mode": "at_ids", "temperature": 1.0, "k": 0, "items": []}
    wrong = [
        {**fields, key: value}
        for key in ("v", "mode")
        for value in ("x" * (1 << 20), b"x" * (1 << 20), [b"x" * (1 << 20)], "x" * 4096)
    ]
    array = {"n": [1], "w": b"x" * (1 << 20), "b": b"12"}
    wrong.append({**fields, "items": [{"prompt": array, "response": array}]})
    wrong.append({**fields, "items": [{"prompt": {**array, "n": [b"x" * (1 << 20)]}, "response": array}]})
    async with teacher.http() as http:
        for message in wrong:
            reply = await http.post("/v1/score", content=msgpack.packb(message))
            assert reply.status_code == 400
            assert len(reply.content) < 400


async def test_a_context_with_unknown_ids_is_refused(teacher: Running) -> None:
    """An engine that looked up such an embedding would die, for all tenants."""
    ids = as_ids([1, teacher.info.vocab_size])
    context = teacher.context(ids)
    async with teacher.http() as http:
        reply = await http.put(f"/v1/contexts/{context.hash}", content=encode_context(context))
    assert (reply.status_code, reply.json()["error"]) == (422, "bad_ids")


async def test_a_key_is_needed(teacher: Running) -> None:
    async with teacher.http(None) as http:
        replies = [
            await http.get("/v1/info"),
            await http.get("/metrics"),
            await post(http, request_of(items(1, 1))),
            await put(http, teacher.context(tokens(4, 5))),
            await http.get("/v1/info", headers={"Authorization": "Bearer wrong"}),
            await http.get("/v1/info", headers={"Authorization": f"Basic {KEYS['red']}"}),
        ]
        assert {reply.status_code for reply in replies} == {401}
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200


async def test_tenants_do_not_see_each_others_contexts(teacher: Running) -> None:
    """Neither as a context, nor as a parent, nor by the time that a warm cache saves."""
    context = teacher.context(tokens(5, 64))
    child = teacher.context(tokens(5, 70), context)
    item = items(1, 1, context=context.hash)
    async with teacher.http("red") as red, teacher.http("blue") as blue:
        await put(red, context)
        assert isinstance((await scored(red, item)).results[0], ItemScore)
        (unknown,) = (await scored(blue, item)).results
        assert isinstance(unknown, ItemError)
        assert unknown.code == "unknown_context"
        stranger = await put(blue, child)
        never = await put(blue, type(child)(child.hash, child.ids, "3" * 64))
        assert stranger.status_code == never.status_code == 404
        assert stranger.json()["message"].replace(context.hash, "") == never.json()["message"].replace("3" * 64, "")
        await put(blue, context)
        assert isinstance((await scored(blue, item, run="own")).results[0], ItemScore)
        assert b'opcd_teacher_context_tokens_computed_total{run="blue/own"} 64.0' in teacher.service.render_metrics()


async def test_metrics_are_the_operators(teacher: Running) -> None:
    async with teacher.http("red") as red, teacher.http("operator") as operator:
        await scored(red, items(1, 2, response=9), run="counted")
        assert (await red.get("/metrics")).status_code == 403
        lines = (await operator.get("/metrics")).text.splitlines()
    series = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(series['opcd_teacher_tokens_scored_total{run="red/counted"}']) == 18
    assert float(series['opcd_teacher_requests_total{run="red/counted",status="200"}']) == 1
    assert float(series["opcd_teacher_batch_items_count"]) >= 1
    assert not any(key in line for key in KEYS.values() for line in lines)


async def test_a_run_is_known_by_its_first_request_that_can_be_answered(teacher: Running) -> None:
    """Refused requests with invented names leave no series."""
    async with teacher.http("blue") as blue, teacher.http("operator") as operator:
        for run in ("made-up-1", "made-up-2"):
            assert (await post(blue, request_of(items(1, 1), run=run, mode="teacher_topk", k=0))).status_code == 400
        before = (await operator.get("/metrics")).text
        await scored(blue, items(1, 1), run="real")
        assert (await post(blue, request_of(items(1, 1), run="real", mode="teacher_topk", k=0))).status_code == 400
        after = (await operator.get("/metrics")).text
    assert "made-up" not in after
    assert 'opcd_teacher_rejected_total{reason="k",run="blue/other"} 2.0' in before
    assert 'opcd_teacher_requests_total{run="blue/real",status="400"} 1.0' in after


async def test_refused_keys_and_the_bytes_of_contexts_are_counted(teacher: Running) -> None:
    async def counted() -> dict[str, float]:
        async with teacher.http("operator") as operator:
            lines = (await operator.get("/metrics")).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = await counted()
    context = teacher.context(tokens(8, 40))
    async with teacher.http(None) as stranger, teacher.http("blue") as blue:
        assert (await put(stranger, context)).status_code == 401
        assert (await stranger.get("/metrics")).status_code == 401
        assert (await put(blue, context)).status_code == 200
    after = await counted()
    strangers, bodies = "opcd_teacher_unauthorised_total", 'opcd_teacher_context_bytes_in_total{tenant="blue"}'
    assert after[strangers] - before[strangers] == 2
    assert after[bodies] - before.get(bodies, 0) == len(encode_context(context))


async def test_what_the_cache_saves_is_counted(teacher: Running) -> None:
    context = teacher.context(tokens(6, 50))
    async with teacher.http("red") as red, teacher.http("operator") as operator:
        await put(red, context)
        await scored(red, items(1, 4, context=context.hash), run="saver")
        await scored(red, items(2, 4, context=context.hash), run="saver")
        text = (await operator.get("/metrics")).text
    assert 'opcd_teacher_context_tokens_computed_total{run="red/saver"} 50.0' in text
    assert 'opcd_teacher_context_tokens_saved_total{run="red/saver"} 350.0' in text
