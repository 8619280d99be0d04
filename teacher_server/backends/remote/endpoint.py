"""HTTP to the inference endpoint: retries with growing pauses, bounded replies, one deadline per request."""

from __future__ import annotations

import json
import random
import ssl
import time
from pathlib import Path
from typing import Any

import httpx

from common.error_text import one_line

RETRIED_STATUS = frozenset({408, 429, 502, 503, 504})
MAX_BROKEN = 3
"""Attempts of a request whose connection broke or that got a 500: the endpoint may die of this request."""

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
MAX_JITTER = 1.5
MAX_RETRY_AFTER_S = 60.0
CONNECT_TIMEOUT_S = 5.0
LOST_AFTER_S = 120.0
"""Seconds that the endpoint may be unreachable before requests fail; later ones then have a single attempt."""

MESSAGE_CHARACTERS = 200


class EndpointError(Exception):
    """The endpoint gave no usable reply; the message names its address and the last error. Never holds the key."""


class RequestRefused(EndpointError):
    """The endpoint refused this request with a `status` that is not retried."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class EndpointCut(EndpointError):
    """The connection broke in each of `MAX_BROKEN` attempts of one request: the endpoint seems to die of it."""


class Endpoint:
    """Connections to one address, for several threads."""

    def __init__(
        self,
        address: str,
        *,
        key: str | None = None,
        key_file: Path | None = None,
        ca_file: Path | None = None,
        max_connections: int,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`address` may end with ``/v1``. `key_file` is for errors, `transport` for tests. Raises EndpointError."""
        self.address = address.rstrip("/").removesuffix("/v1")
        self._key, self._key_file = key, key_file
        headers = {"Accept-Encoding": "identity"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        try:
            verify: ssl.SSLContext | bool = True if ca_file is None else ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise EndpointError(f"teacher.ca_file {ca_file} cannot be used: {error}") from error
        self._http = httpx.Client(
            base_url=self.address,
            headers=headers,
            verify=verify,
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            transport=transport,
        )
        self.failures = 0
        """Attempts that got no reply. A change means that another process may have begun to answer."""
        self._down_since: float | None = None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, path: str, body: Any = None, *, max_bytes: int, timeout_s: float) -> bytes:
        """Return the body of the first 200: a GET, or a POST of `body` as JSON. Raises EndpointError.

        Repeats the request while the endpoint is down or busy, within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        backoff = FIRST_BACKOFF_S
        broken = cut = 0
        while True:
            pause_s = 0.0
            try:
                status, content, pause_s = self._attempt(path, body, max_bytes, deadline)
                self._down_since = None
                if status == 200:
                    return content
                reason = f"HTTP {status} {self._message(content)}".rstrip()
                if status == 500:
                    broken += 1
                elif status not in RETRIED_STATUS:
                    raise self._refusal(status, reason)
            except httpx.RequestError as error:
                self.failures += 1
                self._down_since = self._down_since or time.monotonic()
                reason = f"{type(error).__name__} {one_line(error)}"
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
                    broken += 1
                    cut += isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
            wait = max(pause_s, backoff) * random.uniform(1.0, MAX_JITTER)
            down_s = 0.0 if self._down_since is None else time.monotonic() - self._down_since
            if broken >= MAX_BROKEN or down_s > LOST_AFTER_S or time.monotonic() + wait >= deadline:
                kind = EndpointCut if cut >= MAX_BROKEN else EndpointError
                raise kind(f"the endpoint {self.address} did not answer {path}, last error: {reason}")
            time.sleep(wait)
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    def _attempt(self, path: str, body: Any, max_bytes: int, deadline: float) -> tuple[int, bytes, float]:
        """Status, body and ``Retry-After`` of one attempt. Raises httpx.RequestError and EndpointError."""
        left = max(deadline - time.monotonic(), 0.1)
        timeout = httpx.Timeout(left, connect=min(CONNECT_TIMEOUT_S, left))
        method = "GET" if body is None else "POST"
        with self._http.stream(method, path, json=body, timeout=timeout) as reply:
            content = bytearray()
            for part in reply.iter_bytes():
                content += part
                if len(content) > max_bytes:
                    raise EndpointError(f"the endpoint {self.address} answered {path} with more than {max_bytes} bytes")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the reply was not complete at the deadline")
            return reply.status_code, bytes(content), _retry_after_s(reply)

    def _refusal(self, status: int, reason: str) -> RequestRefused:
        text = f": {reason}"
        if status in (401, 403) and self._key is None:
            text = f" wants a key, set teacher.endpoint_key_file ({reason})"
        elif status in (401, 403):
            text = f" refuses the key in teacher.endpoint_key_file {self._key_file} ({reason})"
        elif 300 <= status < 400:
            text = f" redirects (HTTP {status}): set teacher.endpoint to the address that answers"
        return RequestRefused(status, f"the endpoint {self.address}{text}")

    def _message(self, content: bytes) -> str:
        """The error message of a refusal, in one line, without the key in case the endpoint repeats it."""
        try:
            body = json.loads(content)
            body = body.get("error", body)
            text = str(body["message"] if isinstance(body, dict) else body)
        except (ValueError, KeyError, AttributeError, RecursionError):
            text = content.decode(errors="replace")
        if self._key is not None:
            text = text.replace(self._key, "***")
        return one_line(text)[:MESSAGE_CHARACTERS] if text.strip() else ""


def _retry_after_s(reply: httpx.Response) -> float:
    """``Retry-After`` in seconds, bounded; 0 if there is none. A date counts as none."""
    try:
        return min(max(float(reply.headers.get("Retry-After", 0)), 0.0), MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0
