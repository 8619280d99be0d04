"""What the OpenAPI page says of keys, headers, bodies and refusals; the bytes inside are laid out in
docs/teacher-api.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.security import HTTPBearer
from pydantic import BaseModel

from common.protocol.codec import MEDIA_TYPE
from teacher_server.http.headers import DEADLINE_HEADER, ROUTE_HEADER

REFUSALS: Mapping[int, str] = {
    400: "The request is wrong: `error` says in which part.",
    401: "A bearer key of this teacher is needed.",
    403: "This key may not.",
    404: "The parent is not here: put it first.",
    408: "The body came too slowly.",
    409: "The request id was used for another request.",
    413: "Too many bytes or items for one request.",
    422: "The context cannot be stored under this name.",
    429: "Too much at a time: wait `Retry-After` seconds, then send it again.",
    503: "Shutting down, or not up yet: connect again.",
    504: "Not scored in the time that the client allowed.",
}


class Refusal(BaseModel):
    """The body of every answer that is not 2xx."""

    error: str
    """Machine-readable."""
    message: str


class Stored(BaseModel):
    """A context that is here now."""

    hash: str
    tokens: int


Documented = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Documented:
    """``responses=`` of a route that may refuse with `statuses`."""
    return {status: {"model": Refusal, "description": REFUSALS[status]} for status in statuses}


def binary_reply(what: str) -> Documented:
    """``responses=`` of a route that answers with a message."""
    return {200: {"description": f"msgpack: {what}", "content": _message()}}


def text_reply(what: str) -> Documented:
    """``responses=`` of a route that answers with text."""
    return {200: {"description": what, "content": {"text/plain": {"schema": {"type": "string"}}}}}


KEY = HTTPBearer(scheme_name="key", description="A key of this teacher, where it has keys.", auto_error=False)
"""Declares the scheme only: `Authenticator` checks it."""

_HEADERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    DEADLINE_HEADER: (
        "Seconds that the client will wait, by default an hour: what is not scored by then is refused with 504.",
        {"type": "number", "exclusiveMinimum": 0},
    ),
    ROUTE_HEADER: (
        "The hash of the context that the request is about: a server of several replicas routes by it.",
        {"type": "string"},
    ),
}


def binary_body(what: str, *headers: str) -> dict[str, Any]:
    """``openapi_extra=`` of a route that takes a message, and `headers` beside it."""
    return {
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in ((name, _HEADERS[name]) for name in headers)
        ],
        "requestBody": {
            "required": True,
            "description": f"msgpack: {what}, laid out as docs/teacher-api.md says",
            "content": _message(),
        },
    }


def _message() -> dict[str, Any]:
    return {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
