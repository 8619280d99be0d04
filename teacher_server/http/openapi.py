"""OpenAPI descriptions of keys, headers, bodies and refusals. docs/teacher-api.md describes the bytes of a body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.security import HTTPBearer
from pydantic import BaseModel

from common.protocol.codec import MEDIA_TYPE
from teacher_server.http.headers import DEADLINE_HEADER, ROUTE_HEADER

REFUSALS: Mapping[int, str] = {
    400: "The request is invalid: `error` names the part.",
    401: "A valid bearer key is required.",
    403: "The key of the tenant `operator` is required.",
    404: "The parent is not stored: put the parent first.",
    408: "The body came too slowly.",
    409: "The request id was used with another body.",
    413: "Too many bytes, items or tokens for one request.",
    422: "The context cannot be stored under this name.",
    429: "The server is busy: send the request again after `Retry-After` seconds.",
    503: "The server is starting, stopping or broken: connect again.",
    504: "Not scored within the deadline of the request.",
}


class Refusal(BaseModel):
    """Body of every refusal."""

    error: str
    """Machine-readable."""
    message: str


class Stored(BaseModel):
    """A stored context."""

    hash: str
    tokens: int


Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int) -> Responses:
    """``responses=`` of a route that refuses with `statuses`."""
    return {status: {"model": Refusal, "description": REFUSALS[status]} for status in statuses}


def binary_reply(message: str) -> Responses:
    """``responses=`` of a route that replies with a msgpack message."""
    return {200: {"description": f"msgpack: {message}", "content": _message()}}


def text_reply(description: str) -> Responses:
    """``responses=`` of a route that replies with text."""
    return {200: {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


KEY = HTTPBearer(scheme_name="key", description="A tenant's key. A teacher without keys ignores it.", auto_error=False)
"""Declares the scheme. `Authenticator` checks the keys."""

_HEADERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    DEADLINE_HEADER: (
        "Seconds that the client waits, by default an hour. A request not scored by then is refused with 504.",
        {"type": "number", "exclusiveMinimum": 0},
    ),
    ROUTE_HEADER: (
        "Hash of the request's context. A server of several replicas routes by it.",
        {"type": "string"},
    ),
}


def binary_body(message: str, *headers: str) -> dict[str, Any]:
    """``openapi_extra=`` of a route that takes a msgpack message and `headers`."""
    return {
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in ((name, _HEADERS[name]) for name in headers)
        ],
        "requestBody": {
            "required": True,
            "description": f"msgpack: {message}, in the layout of docs/teacher-api.md",
            "content": _message(),
        },
    }


def _message() -> dict[str, Any]:
    return {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
