"""schemathesis against the OpenAPI page over loopback: the server keeps to the page for any request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from common.protocol.codec import MEDIA_TYPE
from tests.support.teacher_running import KEYS, running


@schemathesis.serializer(MEDIA_TYPE)
def binary(_: schemathesis.SerializationContext, value: object) -> bytes:
    """Send generated bodies unchanged."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def page(tiny_model: Path) -> Iterator[schemathesis.BaseSchema]:
    with running(tiny_model, max_body_bytes=1 << 20) as server:
        yield schemathesis.openapi.from_url(server.url + "/openapi.json")


ROUTES = [
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/info"),
    ("PUT", "/v1/contexts/{name}"),
    ("POST", "/v1/score"),
]


def test_keys_and_headers_are_declared_where_they_are_taken(page: schemathesis.BaseSchema) -> None:
    spec = page.raw_schema
    (scheme,) = spec["components"]["securitySchemes"]
    assert spec["components"]["securitySchemes"][scheme]["scheme"] == "bearer"
    taken = {}
    for method, path in ROUTES:
        operation = spec["paths"][path][method.lower()]
        headers = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "header"}
        taken[path] = (operation.get("security"), headers)
    assert taken == {
        "/healthz": (None, set()),
        "/readyz": (None, set()),
        "/metrics": ([{scheme: []}], set()),
        "/v1/info": ([{scheme: []}], set()),
        "/v1/contexts/{name}": ([{scheme: []}], {"X-Session-Id"}),
        "/v1/score": ([{scheme: []}], {"X-Deadline-S", "X-Session-Id"}),
    }


def test_every_route_is_tried(page: schemathesis.BaseSchema) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in page.get_all_operations()}
    assert found == set(ROUTES)


@pytest.mark.parametrize("tenant", ["operator", None])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_any_request_is_answered_as_documented(
    page: schemathesis.BaseSchema,
    method: str,
    path: str,
    tenant: str | None,
    pytestconfig: pytest.Config,
) -> None:
    """Status, content type, schema of the body and headers, for requests in and out of the documented form."""
    key = {} if tenant is None else {"Authorization": f"Bearer {KEYS[tenant]}"}
    long = pytestconfig.getoption("--long")

    # The page declares a body as any bytes, so most generated bodies are rightly refused.
    excluded = [positive_data_acceptance]

    @settings(max_examples=2000 if long else 25, suppress_health_check=list(HealthCheck), database=None)
    @given(page[path][method].as_strategy())
    def every(case: schemathesis.Case) -> None:
        case.call_and_validate(headers=key, excluded_checks=excluded)

    every()
