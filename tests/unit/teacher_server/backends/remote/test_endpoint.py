"""HTTP to an inference endpoint: retries, refusals, bounds, and a key that no error shows."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.config.model import TeacherConfig
from teacher_server.backends.base import BackendError
from teacher_server.backends.remote import endpoint as module
from teacher_server.backends.remote import model as model_module
from teacher_server.backends.remote.backend import RemoteBackend
from teacher_server.backends.remote.endpoint import MAX_BROKEN, Endpoint, EndpointError, RequestRefused

ADDRESS = "http://endpoint:8000"
KEY = "secret-key"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between attempts, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def endpoint(*replies: Any, key: str | None = None) -> tuple[Endpoint, list[httpx.Request]]:
    """An endpoint with the given replies (or errors), the last one again and again."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        reply = replies[min(len(requests), len(replies)) - 1]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(**reply)

    made = Endpoint(
        f"{ADDRESS}/v1/",
        key=key,
        key_file=Path("secrets/key"),
        max_connections=4,
        transport=httpx.MockTransport(answer),
    )
    return made, requests


def sent(one: Endpoint, *, timeout_s: float = 60.0) -> bytes:
    return one.send("/v1/completions", {"a": 1}, max_bytes=1000, timeout_s=timeout_s)


GOOD = {"status_code": 200, "content": b"good"}


def test_the_key_and_the_body_are_sent() -> None:
    one, requests = endpoint(GOOD, key=KEY)
    assert sent(one) == b"good"
    assert one.send("/v1/models", max_bytes=10, timeout_s=1) == b"good"
    assert [(request.method, str(request.url)) for request in requests] == [
        ("POST", f"{ADDRESS}/v1/completions"),
        ("GET", f"{ADDRESS}/v1/models"),
    ]
    assert {request.headers["Authorization"] for request in requests} == {f"Bearer {KEY}"}
    assert requests[0].content == b'{"a":1}'


@pytest.mark.parametrize("status", sorted(module.RETRIED_STATUS))
def test_a_busy_endpoint_is_asked_again_when_it_says(status: int, pauses: list[float]) -> None:
    busy = {"status_code": status, "headers": {"Retry-After": "7"}}
    one, _ = endpoint(busy, {"status_code": status}, {"status_code": status, "headers": {"Retry-After": "soon"}}, GOOD)
    assert sent(one) == b"good"
    assert 7 <= pauses[0] <= 7 * module.MAX_JITTER
    assert all(pause <= 4 * module.MAX_JITTER * module.FIRST_BACKOFF_S for pause in pauses[1:])
    assert len(pauses) == 3
    assert one.failures == 0


def test_an_endpoint_that_is_down_is_waited_for(pauses: list[float]) -> None:
    one, requests = endpoint(*[httpx.ConnectError("refused")] * 9, GOOD)
    assert sent(one) == b"good"
    assert len(requests) == 10
    assert one.failures == 9
    assert max(pauses) <= module.MAX_BACKOFF_S * module.MAX_JITTER


def test_an_endpoint_that_was_down_for_long_gets_single_attempts(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOST_AFTER_S", 0.0)
    one, requests = endpoint(httpx.ConnectError("refused"), httpx.ConnectError("refused"), GOOD)
    for _ in range(2):
        with pytest.raises(EndpointError, match=f"the endpoint {ADDRESS} did not answer .*ConnectError refused"):
            sent(one)
    assert sent(one) == b"good"
    assert len(requests) == 3


@pytest.mark.parametrize("fault", [httpx.ReadError("reset"), httpx.RemoteProtocolError("closed"), {"status_code": 500}])
def test_a_request_that_may_be_deadly_has_few_attempts(fault: Any, pauses: list[float]) -> None:
    one, requests = endpoint(fault)
    with pytest.raises(EndpointError, match="last error"):
        sent(one)
    assert len(requests) == MAX_BROKEN
    one, _ = endpoint(*[fault] * (MAX_BROKEN - 1), GOOD)
    assert sent(one) == b"good"


def test_the_deadline_ends_the_attempts(pauses: list[float]) -> None:
    one, requests = endpoint({"status_code": 503, "headers": {"Retry-After": "30"}})
    with pytest.raises(EndpointError, match="HTTP 503"):
        sent(one, timeout_s=10)
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("status", "key", "says"),
    [
        (401, None, "wants a key, set teacher.endpoint_key_file (HTTP 401 no such model)"),
        (401, KEY, "refuses the key in teacher.endpoint_key_file secrets/key (HTTP 401 no such model)"),
        (403, KEY, "refuses the key in teacher.endpoint_key_file secrets/key (HTTP 403 no such model)"),
        (302, None, "redirects (HTTP 302): set teacher.endpoint to the address that answers"),
        (404, None, ": HTTP 404 no such model"),
        (400, KEY, ": HTTP 400 no such model"),
    ],
)
def test_a_refusal_is_final_and_says_why(status: int, key: str | None, says: str) -> None:
    reply = {
        "status_code": status,
        "headers": {"Location": "http://elsewhere/"},
        "json": {"error": {"message": "no such\nmodel", "code": status}},
    }
    one, requests = endpoint(reply, key=key)
    with pytest.raises(RequestRefused) as caught:
        sent(one)
    assert caught.value.status == status
    assert str(caught.value) == f"the endpoint {ADDRESS}{says if says[0] == ':' else ' ' + says}"
    assert len(requests) == 1


@pytest.mark.parametrize(
    "content",
    [f"bad key {KEY}".encode(), b'{"error": {"message": "%s"}}' % KEY.encode(), b'{"message": "%s"}' % KEY.encode()],
)
def test_no_error_shows_the_key_or_more_than_a_line(content: bytes) -> None:
    one, _ = endpoint({"status_code": 418, "content": content}, key=KEY)
    with pytest.raises(EndpointError, match=r"\*\*\*") as caught:
        sent(one)
    assert KEY not in str(caught.value)
    one, _ = endpoint({"status_code": 422, "content": b"x\n" * 400})
    with pytest.raises(EndpointError) as caught:
        sent(one)
    assert len(str(caught.value)) < 300


def test_a_reply_is_bounded() -> None:
    one, requests = endpoint({"status_code": 200, "content": b"x" * 1001})
    with pytest.raises(EndpointError, match="more than 1000 bytes"):
        sent(one)
    assert len(requests) == 1


# --- over a socket --------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], str]]:
    """Start HTTP servers on loopback that answer a request with a function; returns their addresses."""
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        handler = type(
            "Handler", (BaseHTTPRequestHandler,), {"do_GET": answer, "do_POST": answer, "log_message": lambda *_: None}
        )
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_reply_that_never_ends_is_cut(serve: Any) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 1000)
        except OSError:
            pass

    one = Endpoint(serve(endless), max_connections=1)
    with pytest.raises(EndpointError, match="more than 100000 bytes"):
        one.send("/", max_bytes=100_000, timeout_s=600)


def test_a_reply_that_drips_ends_at_the_deadline(serve: Any) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    one = Endpoint(serve(drip), max_connections=1)
    with pytest.raises(EndpointError, match="did not answer /, last error: ReadTimeout"):
        one.send("/", max_bytes=100_000, timeout_s=0.5)


def test_a_redirect_carries_the_key_nowhere(serve: Any) -> None:
    asked = []

    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)

    address = serve(elsewhere)

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", f"{address}/v1/models")
        handler.end_headers()

    one = Endpoint(serve(redirect), key=KEY, max_connections=1)
    with pytest.raises(EndpointError, match="redirects"):
        one.send("/v1/models", max_bytes=1000, timeout_s=600)
    assert asked == []


# --- the start ------------------------------------------------------------------------------------------------------


def teacher(tmp_path: Path, address: str, **settings: Any) -> TeacherConfig:
    return TeacherConfig(model=str(tmp_path), backend="remote", endpoint=address, **settings)


def test_an_endpoint_that_is_down_ends_the_start_within_seconds(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model_module.START_TIMEOUT_S < 10
    monkeypatch.setattr(model_module, "START_TIMEOUT_S", 0.5)
    with socket.socket() as closed:  # a port without a listener
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(BackendError) as caught:
            RemoteBackend.load(teacher(tiny_model, address), None)
    assert len(str(caught.value).splitlines()) == 1
    assert address in str(caught.value)
    assert "ConnectError" in str(caught.value)


def test_a_key_file_that_holds_no_key_ends_the_start(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "key"
    for text in ("", "two words", "a\x00b", "\u00e9"):
        path.write_text(text)
        with pytest.raises(BackendError, match=r"teacher.endpoint_key_file .*/key must hold one key and nothing else"):
            RemoteBackend.load(teacher(tiny_model, ADDRESS, endpoint_key_file=path), None)
    with pytest.raises(BackendError, match="none cannot be read: FileNotFoundError"):
        RemoteBackend.load(teacher(tiny_model, ADDRESS, endpoint_key_file=tmp_path / "none"), None)
    with pytest.raises(BackendError, match=r"teacher.ca_file .* cannot be used"):
        RemoteBackend.load(teacher(tiny_model, ADDRESS, ca_file=path), None)
