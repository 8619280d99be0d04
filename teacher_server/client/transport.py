"""HTTP transport to a teacher: retries with jitter, back-pressure, a circuit breaker, one deadline per call."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from dataclasses import dataclass, field

import httpx

from common.protocol.codec import MEDIA_TYPE
from common.protocol.scoring import TeacherError
from teacher_server.http.headers import DEADLINE_HEADER, ROUTE_HEADER

RETRIED_STATUS = frozenset({408, 429, 502, 503, 504})
MAX_RETRIED_500S = 3
"""Consecutive 500 replies that are retried: a proxy sends one for a replica that died, a bug of the server persists."""

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
MAX_JITTER = 1.5
"""Maximum factor on a pause (at least 1), so that clients do not return all at once."""

CONNECT_TIMEOUT_S = 10.0


@dataclass
class Breaker:
    """Circuit breaker. After `threshold` consecutive failures one caller at a time probes the server, the others wait;
    a successful probe releases all of them.
    """

    threshold: int = 3
    failures: int = 0
    down_since: float | None = None
    probe: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def open(self) -> bool:
        """True if the server counts as down."""
        return self.failures >= self.threshold

    def record_failure(self) -> None:
        """Record that the server was unreachable."""
        self.failures += 1
        if self.down_since is None:
            self.down_since = time.monotonic()

    def record_reply(self) -> None:
        """Record a reply of any status."""
        self.failures, self.down_since = 0, None

    @property
    def down_s(self) -> float:
        """Seconds since the first of the consecutive failures."""
        return 0.0 if self.down_since is None else time.monotonic() - self.down_since


class Transport:
    """Sends requests, all of them safe to repeat: contexts are immutable and scoring changes nothing.

    Raises TeacherError if a call's deadline passes or the server is unreachable for `lost_after_s`.
    """

    def __init__(
        self, url: str, *, timeout_s: float, lost_after_s: float, api_key: str | None = None, ca_file: str | None = None
    ) -> None:
        """`timeout_s` is the deadline of each call, retries included."""
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self._lost_after_s = lost_after_s
        self.breaker = Breaker()
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
            verify=_tls_context(self.url, ca_file),
            trust_env=False,
        )

    async def send(
        self, method: str, path: str, body: bytes | None = None, *, route: str | None = None
    ) -> httpx.Response:
        """The first reply with a status that is not retried; it may still be an error.

        Requests of one `route` (a context's hash) go to the same replica.
        """
        headers = {} if body is None else {"Content-Type": MEDIA_TYPE}
        if route is not None:
            headers[ROUTE_HEADER] = route
        deadline = time.monotonic() + self.timeout_s
        backoff = FIRST_BACKOFF_S
        count_500 = 0
        while True:
            reply, reason = await self._try(method, path, body, headers, deadline)
            count_500 = count_500 + 1 if reply is not None and reply.status_code == 500 else 0
            if reply is not None and reply.status_code not in RETRIED_STATUS and not 0 < count_500 <= MAX_RETRIED_500S:
                return reply
            retry_after_s = 0.0 if reply is None else _retry_after(reply)
            wait = max(retry_after_s, backoff) * random.uniform(1.0, MAX_JITTER)
            if self.breaker.down_s > self._lost_after_s:
                raise TeacherError(
                    f"the teacher at {self.url} has been unreachable for {self.breaker.down_s:.0f} s ({reason}): "
                    "start it again and resume the run"
                )
            if time.monotonic() + wait >= deadline:
                raise TeacherError(
                    f"the teacher at {self.url} did not answer {method} {path} within {self.timeout_s:g} s "
                    f"(last: {reason}): it is down or too busy; start it again, or raise teacher.request_timeout_s"
                )
            await asyncio.sleep(wait)
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _try(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], deadline: float
    ) -> tuple[httpx.Response | None, str]:
        """One attempt, after a probe if the breaker is open: (reply or None, reason for a retry)."""
        probe = self.breaker.probe
        if self.breaker.open:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await probe.acquire()
            except TimeoutError:
                return None, "no time left while another request probed the server"
            try:
                if self.breaker.open:  # another caller's probe may have closed it
                    return await self._attempt(method, path, body, headers, deadline)
            finally:
                probe.release()
        return await self._attempt(method, path, body, headers, deadline)

    async def _attempt(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], deadline: float
    ) -> tuple[httpx.Response | None, str]:
        left = deadline - time.monotonic()
        if left <= 0:
            return None, "no time left"
        headers = {**headers, DEADLINE_HEADER: f"{left:.3f}"}
        timeout = httpx.Timeout(left, connect=min(CONNECT_TIMEOUT_S, left))
        try:
            reply = await self._http.request(method, path, content=body, headers=headers, timeout=timeout)
        except httpx.TransportError as error:
            self._refuse_wrong_tls(error)
            self.breaker.record_failure()
            return None, f"{type(error).__name__} {error}".strip()
        self.breaker.record_reply()
        return reply, f"HTTP {reply.status_code}"

    def _refuse_wrong_tls(self, error: BaseException | None) -> None:
        """Raise TeacherError for TLS errors that a retry cannot fix."""
        while error is not None and not isinstance(error, ssl.SSLError):
            error = error.__cause__ or error.__context__
        if isinstance(error, ssl.SSLCertVerificationError):
            raise TeacherError(
                f"the certificate of the teacher at {self.url} is not trusted ({error.verify_message}): set "
                "teacher.ca_file to the PEM file of its issuer, and use the certificate's host name in teacher.url"
            )
        if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            raise TeacherError(f"the teacher at {self.url} does not speak HTTPS: use http:// in teacher.url")


def _tls_context(url: str, ca_file: str | None) -> ssl.SSLContext | bool:
    """TLS context that trusts `ca_file`, or the system. Raises TeacherError for an unreadable `ca_file`."""
    if not url.startswith("https:"):
        return False  # unused; loading the system's certificates takes longer than a request
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise TeacherError(f"teacher.ca_file {ca_file} is not a readable PEM bundle: {error}") from error


def _retry_after(reply: httpx.Response) -> float:
    try:
        return min(60.0, max(0.0, float(reply.headers.get("Retry-After", "0"))))
    except ValueError:
        return 0.0
