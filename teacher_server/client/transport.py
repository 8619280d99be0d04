"""HTTP to a teacher: retries with jitter on safe errors, back-pressure, a circuit breaker, one deadline over all."""

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
FAULTS_RETRIED = 3
"""Answers 500 in a row that are tried again: a proxy gives one for a replica that died, a fault of ours would stay."""

FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 5.0
LATEST = 1.5
"""Times the pause that was asked for, never less than it: jitter, so that clients do not come back all at once."""

CONNECT_TIMEOUT_S = 10.0


@dataclass
class Breaker:
    """After `threshold` failures in a row one caller at a time tries, the others wait for what it finds out: once it
    got through, they all go on together.
    """

    threshold: int = 3
    failures: int = 0
    down_since: float | None = None
    probe: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def open(self) -> bool:
        """Whether the server counts as down."""
        return self.failures >= self.threshold

    def failed(self) -> None:
        """The server could not be reached."""
        self.failures += 1
        if self.down_since is None:
            self.down_since = time.monotonic()

    def succeeded(self) -> None:
        """The server answered, whatever it said."""
        self.failures, self.down_since = 0, None

    @property
    def down_s(self) -> float:
        """Since when nothing got through."""
        return 0.0 if self.down_since is None else time.monotonic() - self.down_since


class Transport:
    """Sends requests that may all be repeated: contexts are immutable, scoring changes nothing.

    Raises TeacherError when a call's deadline has passed, or the server was out of reach for `lost_after_s`.
    """

    def __init__(
        self, url: str, *, timeout_s: float, lost_after_s: float, api_key: str | None = None, ca_file: str | None = None
    ) -> None:
        """`timeout_s` is the deadline of each call, retries included."""
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._lost_after_s = lost_after_s
        self._breaker = Breaker()
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
            verify=_trusted(self.url, ca_file),
            trust_env=False,
        )

    async def send(
        self, method: str, path: str, body: bytes | None = None, *, route: str | None = None
    ) -> httpx.Response:
        """The first answer that is not "try again"; its status may still be an error.

        Requests of one `route` (a context's hash) go to one replica of a server that has several.
        """
        headers = {} if body is None else {"Content-Type": MEDIA_TYPE}
        if route is not None:
            headers[ROUTE_HEADER] = route
        deadline = time.monotonic() + self._timeout_s
        backoff = FIRST_BACKOFF_S
        faults = 0
        while True:
            reply, why = await self._try(method, path, body, headers, deadline)
            faults = faults + 1 if reply is not None and reply.status_code == 500 else 0
            if reply is not None and reply.status_code not in RETRIED_STATUS and not 0 < faults <= FAULTS_RETRIED:
                return reply
            asked = 0.0 if reply is None else _retry_after(reply)
            wait = max(asked, backoff) * random.uniform(1.0, LATEST)
            if self._breaker.down_s > self._lost_after_s:
                raise TeacherError(
                    f"the teacher at {self.url} is out of reach since {self._breaker.down_s:.0f} s ({why}): "
                    "start it again and resume the run"
                )
            if time.monotonic() + wait >= deadline:
                raise TeacherError(
                    f"the teacher at {self.url} gave no answer to {method} {path} in {self._timeout_s:g} s "
                    f"(last: {why}): it is down or too busy; start it again, or raise teacher.request_timeout_s"
                )
            await asyncio.sleep(wait)
            backoff = min(2 * backoff, LONGEST_BACKOFF_S)

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def _try(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], deadline: float
    ) -> tuple[httpx.Response | None, str]:
        """One attempt: (answer or None, why it is not the last one)."""
        probe = self._breaker.probe
        if self._breaker.open:
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await probe.acquire()
            except TimeoutError:
                return None, "no time left while another request tried whether the server is back"
            try:
                if self._breaker.open:  # it may have closed while this one waited
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
            self._breaker.failed()
            return None, f"{type(error).__name__} {error}".strip()
        self._breaker.succeeded()
        return reply, f"HTTP {reply.status_code}"

    def _refuse_wrong_tls(self, error: BaseException | None) -> None:
        """Raises TeacherError for faults of a TLS connection that no further attempt mends."""
        while error is not None and not isinstance(error, ssl.SSLError):
            error = error.__cause__ or error.__context__
        if isinstance(error, ssl.SSLCertVerificationError):
            raise TeacherError(
                f"the certificate of the teacher at {self.url} is not trusted ({error.verify_message}): set "
                "teacher.ca_file to the PEM file of who signed it, and use the name it was made for in teacher.url"
            )
        if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            raise TeacherError(f"the teacher at {self.url} does not speak HTTPS: use http:// in teacher.url")


def _trusted(url: str, ca_file: str | None) -> ssl.SSLContext | bool:
    """Whose certificates are believed; TeacherError where `ca_file` is none."""
    if not url.startswith("https:"):
        return False  # nothing to believe, and reading the system's bundle takes longer than a request
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise TeacherError(f"teacher.ca_file {ca_file} is no PEM bundle that can be read: {error}") from error


def _retry_after(reply: httpx.Response) -> float:
    try:
        return min(60.0, max(0.0, float(reply.headers.get("Retry-After", "0"))))
    except ValueError:
        return 0.0
