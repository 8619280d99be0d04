"""Spans and log lines of score requests, as a real collector gets them over HTTP."""

from __future__ import annotations

import gzip
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.teacher_running import KEYS, items, post, put, request_of, running, tokens

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP endpoint: (address, bodies)."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def attributes(span: Any) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


async def test_the_way_of_a_request_is_a_trace(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    batch = items(1, 3)
    with collector() as (endpoint, bodies), caplog.at_level(logging.INFO, "teacher_server"):
        with running(tiny_model, trace_endpoint=endpoint) as teacher:
            context = teacher.context(tokens(2, 40))
            async with teacher.http("red") as http:
                await put(http, context)
                asked = request_of(batch, request_id="one\n" + "x" * 1000, run="demo")
                whole = await post(http, asked, traceparent=f"00-{TRACE_ID}-{PARENT_ID}-01")
                refused = await post(http, request_of(batch, k=10_000, mode="union", request_id="two", run="demo"))
        assert (whole.status_code, refused.status_code) == (200, 400)
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    roots = {attributes(span)["opcd.request_id"][:4]: span for span in spans if span.name == "POST /v1/score"}
    one, two = roots["'one"], roots["'two"]
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    found = attributes(one)
    assert len(str(found.pop("opcd.request_id"))) <= 100
    assert found == {
        "opcd.tenant": "red",
        "opcd.run": "'demo'",
        "opcd.items": 3,
        "opcd.tokens": 3 * 14,
        "http.response.status_code": 200,
        "error.type": "",
    }
    assert (attributes(two)["http.response.status_code"], attributes(two)["error.type"]) == (400, "k")
    parts = {span.name: span for span in spans if span.trace_id == one.trace_id and span is not one}
    assert set(parts) == {"read", "decode", "queue", "batch", "encode"}
    assert {span.parent_span_id for span in parts.values()} == {one.span_id}
    assert attributes(parts["batch"]) == {"opcd.items": 3, "opcd.batch.items": 3, "opcd.batch.tokens": 42}
    order = [parts[name] for name in ("read", "decode", "queue", "batch", "encode")]
    for earlier, later in pairwise(order):
        assert earlier.start_time_unix_nano <= later.start_time_unix_nano + 1_000_000  # two clocks
    assert one.start_time_unix_nano <= order[0].start_time_unix_nano
    assert order[-1].end_time_unix_nano <= one.end_time_unix_nano
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("score ")]
    assert [line.partition(" seconds=")[0].partition("status=")[2] for line in lines] == ["200 error=", "400 error=k"]
    assert "tenant=red run='demo' request='one\\nxxx" in lines[0]
    assert len(lines[0]) < 400
    secret = [batch[0].prompt_ids.tobytes(), batch[0].prompt_ids.astype("<u2").tobytes(), KEYS["red"].encode()]
    for text in [*bodies, *(line.encode() for line in lines)]:
        assert not any(part in text for part in secret)
        assert str(batch[0].prompt_ids.tolist())[1:-1].encode() not in text
