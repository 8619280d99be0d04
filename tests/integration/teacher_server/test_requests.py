"""A teacher server under repeated, slow, large, unread and cancelled requests."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from common.protocol.codec import decode_response, encode_request
from common.protocol.schema import ItemScore, as_ids
from teacher_server.backends.wire_size import MIN_ITEM_TOKENS
from tests.support.teacher_running import KEYS, Running, items, post, put, request_of, running


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Iterator[Running]:
    with running(tiny_model, max_items=64, max_body_bytes=4 * 1024 * 1024) as server:
        yield server


# --- repeated, cancelled and late requests --------------------------------------------------------------------------


async def test_a_repeated_request_is_computed_once(teacher: Running) -> None:
    """While the first request is computed, and after its reply."""
    request = request_of(items(1, 2), request_id="again")
    async with teacher.http() as http:
        before = len(teacher.gate.batches)
        with teacher.gate.held():
            two = [asyncio.create_task(post(http, request)) for _ in range(2)]
            await asyncio.to_thread(teacher.gate.entered.acquire)
            await asyncio.sleep(0.05)
        first, second = await asyncio.gather(*two)
        third = await post(http, request)
        assert first.content == second.content == third.content
        assert len(teacher.gate.batches) - before == 1
        other = await post(http, request_of(items(2, 2), request_id="again"))
        assert (other.status_code, other.json()["error"]) == (409, "request_id")
        elsewhere = await post(http, request_of(items(2, 2), request_id="again", run="other"))
        assert elsewhere.status_code == 200
    async with teacher.http("blue") as http:
        assert (await post(http, request_of(items(3, 2), request_id="again"))).status_code == 200
    async with teacher.http("operator") as http:
        text = (await http.get("/metrics")).text
    assert 'opcd_teacher_requests_repeated_total{run="red/run"} 2.0' in text


async def test_one_of_two_askers_leaves(teacher: Running) -> None:
    request = request_of(items(1, 1), request_id="leaves")
    async with teacher.http() as http, teacher.http() as impatient:
        with teacher.gate.held():
            stays = asyncio.create_task(post(http, request))
            leaves = asyncio.create_task(post(impatient, request))
            await asyncio.sleep(0.1)
            leaves.cancel()
            await asyncio.sleep(0.1)
        reply = await stays
    assert isinstance(decode_response(reply.content).results[0], ItemScore)


async def test_a_cancelled_request_leaves_the_queue(teacher: Running) -> None:
    async with teacher.http() as http:
        with teacher.gate.held():
            running_now = await begin_batch(teacher, http)
            async with teacher.http() as impatient:
                queued = asyncio.create_task(post(impatient, request_of(items(2, 5))))
                await until(lambda: queued_tokens(teacher) == 5 * MIN_ITEM_TOKENS)
                queued.cancel()
                await asyncio.gather(queued, return_exceptions=True)
            await until(lambda: queued_tokens(teacher) == 0)
        assert (await running_now).status_code == 200
    assert [len(batch) for batch in teacher.gate.batches[-1:]] == [1]


async def test_a_late_request_leaves_the_queue(teacher: Running) -> None:
    async with teacher.http() as http:
        with teacher.gate.held():
            running_now = await begin_batch(teacher, http)
            late = await post(http, request_of(items(2, 5)), **{"X-Deadline-S": "0.1"})
            assert (late.status_code, late.json()["error"]) == (504, "deadline")
            assert queued_tokens(teacher) == 0
        await running_now
        bad = await post(http, request_of(items(1, 1)), **{"X-Deadline-S": "soon"})
        assert bad.status_code == 400


async def test_a_short_deadline_ends_no_other_wait_for_the_same_request(teacher: Running) -> None:
    request = request_of(items(6, 1), request_id="two deadlines")
    async with teacher.http() as http, teacher.http() as patient:
        with teacher.gate.held():
            short = asyncio.create_task(post(http, request, **{"X-Deadline-S": "0.2"}))
            await asyncio.sleep(0.05)
            long = asyncio.create_task(post(patient, request))
            assert (await short).status_code == 504
        assert (await long).status_code == 200


async def begin_batch(teacher: Running, http: httpx.AsyncClient) -> asyncio.Task[httpx.Response]:
    """Send one item; returns when the gate holds its batch."""
    while teacher.gate.entered.acquire(blocking=False):
        pass  # batches of earlier tests
    running_now = asyncio.create_task(post(http, request_of(items(1, 1))))
    assert await asyncio.to_thread(teacher.gate.entered.acquire, timeout=10)
    return running_now


def queued_tokens(teacher: Running) -> float:
    (line,) = (
        line for line in teacher.service.render_metrics().splitlines() if line.startswith(b"opcd_teacher_queued")
    )
    return float(line.split()[1])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that another thread makes true."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition stayed false for 5 s")


# --- slow and malformed HTTP ----------------------------------------------------------------------------------------


async def raw(teacher: Running, data: bytes, *, hold_s: float) -> bytes:
    """Send raw bytes and return the reply until the server closes the connection."""
    host, port = teacher.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), hold_s)
    finally:
        writer.close()


async def test_slow_headers_are_cut_off(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.http.http_limits.HEADERS_TIMEOUT_S", 0.2)
    for start in (b"", b"GET /v1/info HTTP/1.1\r\nHost: x\r\nX-Slow: "):
        assert await raw(teacher, start, hold_s=5) == b""


async def test_endless_headers_are_cut_off(teacher: Running) -> None:
    """Seen as a reset if the server has not read all that came, else as an end."""
    try:
        answer = await raw(teacher, b"GET /v1/info HTTP/1.1\r\nX-Long: " + b"a" * 2_000_000, hold_s=5)
    except ConnectionResetError:
        answer = b""
    assert answer == b""


async def test_requests_sent_ahead_end_the_connection(teacher: Running) -> None:
    """The server would hold kilobytes for each, outside every budget."""
    one = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    few = await raw(teacher, one * 4 + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), hold_s=5)
    assert few.count(b"HTTP/1.1 200") == 5
    many = await raw(teacher, one * 1000, hold_s=5)
    assert b"HTTP/1.1 400" in many
    assert many.count(b"HTTP/1.1 200") < 10


async def test_a_new_connection_replaces_the_one_that_is_idle_for_longest(
    teacher: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant that holds every connection open shuts no other tenant out, and loses no request in progress."""
    monkeypatch.setattr("teacher_server.http.http_limits.MAX_CONNECTIONS", 8)
    host, port = teacher.url.removeprefix("http://").split(":")
    async with teacher.http("red") as red, teacher.http("blue") as blue:
        batches = len(teacher.gate.batches)
        with teacher.gate.held():
            running_now = asyncio.create_task(post(red, request_of(items(1, 1))))
            await until(lambda: len(teacher.gate.batches) > batches)
            held = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
            ends = [asyncio.create_task(reader.read()) for reader, _ in held]
            assert (await blue.get("/healthz")).status_code == 200
            await until(lambda: sum(end.done() for end in ends) >= 12)
        assert (await running_now).status_code == 200
    for _, writer in held:
        writer.close()
    await asyncio.gather(*ends)


async def test_requests_of_one_tenant_are_bounded(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.http.app.MAX_TENANT_REQUESTS", 2)
    async with teacher.http("red") as red, teacher.http("blue") as blue:
        with teacher.gate.held():
            two = [asyncio.create_task(post(red, request_of(items(seed, 1)))) for seed in range(2)]
            await asyncio.to_thread(teacher.gate.entered.acquire)
            await asyncio.sleep(0.1)
            context = teacher.context(as_ids([1, 2]))
            for refused in (await post(red, request_of(items(3, 1))), await put(red, context)):
                assert (refused.status_code, refused.json()["error"]) == (429, "busy")
                assert int(refused.headers["Retry-After"]) >= 1
            other = asyncio.create_task(post(blue, request_of(items(4, 1))))
            await asyncio.sleep(0.1)
            assert not other.done()  # in the queue
        assert {reply.status_code for reply in await asyncio.gather(*two, other)} == {200}
        assert (await put(red, context)).status_code == 200


async def test_a_slow_body_is_cut_off(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.http.bodies.IDLE_S", 0.2)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['red']}\r\nContent-Length: 1000\r\n\r\n"
    answer = await raw(teacher, head.encode() + b"\x80", hold_s=5)
    assert answer.startswith(b"HTTP/1.1 408")


def read_after_a_while(teacher: Running) -> tuple[int, int]:
    """Ask for a reply of nearly the largest size and read its rest 1.5 s after its beginning.

    Returns the received and the announced bytes of its body.
    """
    body = encode_request(
        request_of([replace(item, topk_ids=None) for item in items(0, 40, response=40)], mode="teacher_topk", k=512)
    )
    lines = ["POST /v1/score HTTP/1.1", "Host: x", "Connection: close", f"Authorization: Bearer {KEYS['red']}"]
    host, port = teacher.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        client.settimeout(30)
        came = client.recv(512)
        time.sleep(1.5)
        while piece := client.recv(1 << 20):
            came += piece
        head, _, body = came.partition(b"\r\n\r\n")
        (length,) = (int(line[15:]) for line in head.splitlines() if line.lower().startswith(b"content-length:"))
        return len(body), length


async def test_a_reply_that_nobody_reads_is_thrown_away(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_server.http.http_limits.UNREAD_S", 0.2)
    monkeypatch.setattr("teacher_server.http.http_limits.MIN_BYTES_PER_S", 1 << 30)

    read, length = await asyncio.to_thread(read_after_a_while, teacher)
    assert read < length


async def test_a_reply_that_is_read_slowly_arrives_whole(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allowed time grows with the size."""
    monkeypatch.setattr("teacher_server.http.http_limits.UNREAD_S", 0.2)
    monkeypatch.setattr("teacher_server.http.http_limits.MIN_BYTES_PER_S", 32 * 1024)
    read, length = await asyncio.to_thread(read_after_a_while, teacher)
    assert read == length > 3 << 20


@contextmanager
def two_largest_bodies(teacher: Running) -> Iterator[Callable[[], None]]:
    """One tenant declares bodies of half of the budget and sends none. The function closes one of their connections."""
    lines = ["POST /v1/score HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS['red']}", f"Content-Length: {4 << 20}"]
    host, port = teacher.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(2)]
    try:
        for connection in held:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
        yield held[0].close
    finally:
        for connection in held:
            connection.close()


async def test_a_body_of_unknown_length_counts_as_the_largest(
    teacher: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teacher_server.http.bodies.WAIT_S", 0.2)

    async def chunks() -> AsyncIterator[bytes]:
        yield encode_request(request_of(items(1, 1)))

    async with teacher.http("red") as http:
        with two_largest_bodies(teacher):
            await asyncio.sleep(0.1)
            refused = await http.post("/v1/score", content=chunks())
            assert (refused.status_code, refused.json()["error"]) == (429, "memory")
        await asyncio.sleep(0.1)
        assert (await http.post("/v1/score", content=chunks())).status_code == 200


async def test_memory_of_bodies_is_bounded_before_it_is_taken(
    teacher: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's third body is refused by its declared size; other tenants are served."""
    monkeypatch.setattr("teacher_server.http.bodies.WAIT_S", 0.2)
    with two_largest_bodies(teacher):
        await asyncio.sleep(0.1)
        async with teacher.http("red") as http:
            refused = await http.post("/v1/score", content=b"\0" * (1 << 20))
            assert (refused.status_code, refused.json()["error"]) == (429, "memory")
            assert int(refused.headers["Retry-After"]) >= 1
        async with teacher.http("blue") as http:
            assert (await post(http, request_of(items(1, 1)))).status_code == 200


async def test_a_body_waits_for_room(teacher: Running, caplog: pytest.LogCaptureFixture) -> None:
    """The third body is served as soon as one of the others is gone. The server logs no error for closed clients."""
    with two_largest_bodies(teacher) as let_one_go:
        await asyncio.sleep(0.1)
        async with teacher.http("red") as http:
            third = asyncio.create_task(post(http, request_of(items(1, 1))))
            await asyncio.sleep(0.3)
            assert not third.done()
            let_one_go()
            assert (await asyncio.wait_for(third, 5)).status_code == 200
    await asyncio.sleep(0.1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_memory_of_replies_is_bounded_before_it_is_taken(
    teacher: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two small requests of one tenant have replies of nearly the largest size: a third one finds no room."""
    monkeypatch.setattr("teacher_server.http.bodies.WAIT_S", 0.2)
    many = [replace(item, topk_ids=None) for item in items(0, 50, response=30)]
    request = request_of(many, mode="teacher_topk", k=512)
    async with teacher.http("red") as red, teacher.http("blue") as blue:
        with teacher.gate.held():
            two = [asyncio.create_task(post(red, request)) for _ in range(2)]
            await asyncio.to_thread(teacher.gate.entered.acquire)
            await asyncio.sleep(0.1)
            refused = await post(red, request)
            assert (refused.status_code, refused.json()["error"]) == (429, "memory")
            other = asyncio.create_task(post(blue, request))
            await asyncio.sleep(0.3)
            assert not other.done()  # it is in the queue: another tenant's half is not touched
        assert {reply.status_code for reply in await asyncio.gather(*two, other)} == {200}
        assert (await post(red, request)).status_code == 200


async def test_a_reply_counts_until_the_client_has_it(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two computed replies of nearly the largest size wait to be read: a third one finds no room."""
    monkeypatch.setattr("teacher_server.http.bodies.WAIT_S", 0.2)
    many = [replace(item, topk_ids=None) for item in items(0, 50, response=30)]
    request = request_of(many, mode="teacher_topk", k=512)
    body = encode_request(request)
    host, port = teacher.url.removeprefix("http://").split(":")
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['red']}\r\nContent-Length: {len(body)}"
    unread = []
    for _ in range(2):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        unread.append(connection)
    try:
        await until(lambda: len(teacher.gate.batches) > 0 and queued_tokens(teacher) == 0)
        await asyncio.sleep(1)  # both are computed
        async with teacher.http("red") as red:
            refused = await post(red, request)
            assert (refused.status_code, refused.json()["error"]) == (429, "memory")
            for connection in unread:
                connection.close()
            await asyncio.sleep(0.2)
            assert (await post(red, request)).status_code == 200
    finally:
        for connection in unread:
            connection.close()


async def test_keys_are_not_logged(teacher: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        async with teacher.http() as http:
            await post(http, request_of(items(1, 1)))
            await http.post("/v1/score", content=b"junk")
        await raw(teacher, f"\0 {KEYS['red']}\r\n\r\n".encode(), hold_s=5)
    server_lines = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]
    assert not any(KEYS["red"] in line for line in server_lines)


def test_no_page_loads_scripts_from_the_internet(teacher: Running) -> None:
    for path in ("/docs", "/redoc"):
        assert httpx.get(teacher.url + path, trust_env=False).status_code == 404


def test_openapi_page_names_the_binary_form(teacher: Running) -> None:
    spec = httpx.get(teacher.url + "/openapi.json", trust_env=False).json()
    assert set(spec["paths"]) == {"/healthz", "/readyz", "/metrics", "/v1/info", "/v1/contexts/{name}", "/v1/score"}
    body = spec["paths"]["/v1/score"]["post"]["requestBody"]
    assert "application/vnd.opcd.v1+msgpack" in body["content"]
    assert "docs/teacher-api.md" in body["description"]


async def test_encoded_sizes_are_what_travels(teacher: Running) -> None:
    """Reply and request bytes a token at k = 256 and this vocabulary, measured on a real exchange."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.choice(512, 256, replace=False) for _ in range(64)])
    one = items(1, 1, prompt=16, response=64)[0]
    batch = [type(one)(None, one.prompt_ids, one.response_ids, as_ids(rows))] * 16
    async with teacher.http() as http:
        reply = await post(http, request_of(batch, k=256))
    assert reply.status_code == 200
    assert len(reply.content) / (16 * 64) <= 530
    assert len(encode_request(request_of(batch, k=256))) / (16 * 64) <= 800
