"""Thousands of invalid bodies on every route: no 5xx, no crash, no growth of memory."""

from __future__ import annotations

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config.model import TeacherConfig
from common.protocol.codec import encode_context, encode_request
from common.protocol.schema import ScoreRequest
from teacher_server.http.app import create_app
from teacher_server.http.serve import build_service
from tests.support.teacher_running import authenticator, items, tokens

ROUTES = [
    ("POST", "/v1/score"),
    ("PUT", "/v1/contexts/" + "0" * 64),
    ("PUT", "/v1/contexts/x"),
    ("GET", "/v1/info"),
    ("GET", "/metrics"),
    ("GET", "/readyz"),
    ("DELETE", "/v1/score"),
]
SCALE = 20 if "--long" in sys.argv else 1
"""Hypothesis reads the number of examples at import."""

KEY = {"Authorization": "Bearer key-of-red"}

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=12)
    | st.sampled_from(["at_ids", "union", "teacher_topk", "sampled"])
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


class Server:
    """The application in this process without a socket: thousands of requests take seconds."""

    def __init__(self, model: Path) -> None:
        config = TeacherConfig(model=str(model), threads=1, batch_window_ms=0, max_body_bytes=1 << 20)
        self.loop = asyncio.new_event_loop()
        app = create_app(build_service(config), authenticator())
        self._lifespan = app.router.lifespan_context(app)
        self.loop.run_until_complete(self._lifespan.__aenter__())
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://teacher")

    def request(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
        return self.loop.run_until_complete(self._http.request(method, path, content=body, headers=headers))

    def close(self) -> None:
        self.loop.run_until_complete(self._http.aclose())
        self.loop.run_until_complete(self._lifespan.__aexit__(None, None, None))
        self.loop.close()


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    running = Server(tiny_model)
    yield running
    running.close()


def check(reply: httpx.Response) -> None:
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400 and reply.status_code not in (404, 405):
        assert set(reply.json()) == {"error", "message"}


@settings(max_examples=SCALE * 400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from(ROUTES),
    st.binary(max_size=300) | trees.map(msgpack.packb),
    st.sampled_from([{}, KEY]) | st.just({"Authorization": "Bearer \xff".encode("latin1").decode("latin1")}),
    st.none() | st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=10),
)
def test_anything_on_any_route(
    server: Server, route: tuple[str, str], body: bytes, headers: dict[str, str], deadline: str | None
) -> None:
    extra = {} if deadline is None else {"X-Deadline-S": deadline}
    sent = {name: value.encode("latin1") for name, value in {**headers, **extra}.items()}
    check(server.request(*route, body, sent))


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    """A valid request with up to three nodes replaced by random ones or by other nodes of the request."""
    mode = draw(st.sampled_from(["at_ids", "union", "teacher_topk", "sampled"]))
    base = items(draw(st.integers(0, 3)), 2, response=draw(st.integers(0, 3)))
    message: Any = msgpack.unpackb(encode_request(ScoreRequest("", "run", mode, 1.0, 4, tuple(base))))
    for _ in range(draw(st.integers(0, 3))):
        holders = list(containers(message))
        holder = draw(st.sampled_from(range(len(holders))).map(holders.__getitem__))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if keys:
            other = draw(st.sampled_from(range(len(holders))).map(holders.__getitem__))
            holder[draw(st.sampled_from(keys))] = draw(trees | st.integers(0, 600) | st.just(other))
            if nests(message):
                break
    try:
        return msgpack.packb(message)
    except ValueError:  # a tree that contains itself
        return b""


def containers(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, dict | list) and depth < 8:
        if value:
            yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from containers(inner, depth + 1)


def nests(message: Any) -> bool:
    return sum(1 for _ in containers(message)) > 200


@settings(max_examples=SCALE * 500, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(nearly_right())
def test_requests_that_are_nearly_right(server: Server, body: bytes) -> None:
    check(server.request("POST", "/v1/score", body, KEY))


@settings(max_examples=SCALE * 150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_one_byte_changed(server: Server, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["score", "context"]))
    if kind == "score":
        path, body = "/v1/score", encode_request(ScoreRequest("", "run", "at_ids", 1.0, 8, tuple(items(1, 1))))
    else:
        from common.protocol.schema import Context

        path, body = "/v1/contexts/" + "0" * 64, encode_context(Context("0" * 64, tokens(1, 20)))
    at = data.draw(st.integers(0, len(body) - 1))
    changed = body[:at] + bytes([data.draw(st.integers(0, 255))]) + body[at + 1 :]
    check(server.request("POST" if kind == "score" else "PUT", path, changed, KEY))


def test_no_growth(server: Server) -> None:
    """Two thousand refused requests with invented run names leave no memory behind."""

    def flood(first: int) -> None:
        for n in range(first, first + 1000):
            body = encode_request(ScoreRequest(f"id-{n}", f"run-{n}" * 10, "teacher_topk", 1.0, 0, ()))
            assert server.request("POST", "/v1/score", body, KEY).status_code == 400

    flood(0)
    gc.collect()
    tracemalloc.start()
    flood(1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 300_000
