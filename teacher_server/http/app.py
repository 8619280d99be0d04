"""HTTP routes of the teacher. Bodies use the binary form of ``common.protocol.codec``, refusals are JSON."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import xxhash
from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from common.protocol.codec import MEDIA_TYPE, CodecError, decode_context, decode_request, encode_response
from common.protocol.schema import ItemError, ItemScore, ScoreRequest, TeacherInfo
from teacher_server.http.auth import Authenticator, NotAuthorised
from teacher_server.http.bodies import ByteBudget, memory_of, read_body
from teacher_server.http.headers import DEADLINE_HEADER, ROUTE_HEADER
from teacher_server.http.http_limits import MAX_CONNECTIONS
from teacher_server.http.openapi import KEY, REFUSALS, Stored, binary_body, binary_reply, refusals, text_reply
from teacher_server.http.replies import Conflict, Replies
from teacher_server.http.request_record import RequestRecord
from teacher_server.scoring.checks import RequestRefused
from teacher_server.scoring.service import TeacherService

log = logging.getLogger(__name__)

T = TypeVar("T")
V = TypeVar("V")

INLINE_BYTES = 4096
"""Larger bodies are decoded and encoded in a thread, so that the event loop stays free."""

RESULT_BYTES = 256
"""Counted for each result of a reply, besides its log-probs."""

MAX_BODIES = 4
"""Memory bound in bodies of the largest size: for all requests in progress, and again for their replies."""

REPLY_CACHE_BYTES = 64 * 1024 * 1024
"""Bound on the replies kept for repeated requests."""

MAX_DEADLINE_S = 3600.0

MAX_TENANT_REQUESTS = MAX_CONNECTIONS // 2
"""Requests with a body that one tenant may have in progress."""

_HASH = re.compile(r"[0-9a-f]{64}")


class TeacherApi:
    """Handlers of the routes: authenticate, read, compute, reply."""

    def __init__(self, service: TeacherService, auth: Authenticator) -> None:
        self.service = service
        self.auth = auth
        info = service.info()
        self.max_body_bytes, self.max_items = info.max_body_bytes, info.max_items
        self.body_budget = ByteBudget(MAX_BODIES * memory_of(self.max_body_bytes, self.max_items))
        self.reply_budget = ByteBudget(MAX_BODIES * self.max_body_bytes)
        self.replies = Replies(REPLY_CACHE_BYTES)
        self._requests: Counter[str] = Counter()

    def tenant(self, request: Request) -> str:
        """Authenticate a request; call this before reading anything else of it. Raises RequestRefused (401)."""
        try:
            return self.auth.tenant(request.headers.get("authorization"))
        except NotAuthorised as error:
            self.service.metrics.unauthorised.inc()
            raise RequestRefused(401, "unauthorised", str(error)) from None

    @contextmanager
    def _in_progress(self, tenant: str) -> Iterator[None]:
        """Count a request until the scope ends. Raises RequestRefused (429)."""
        if self._requests[tenant] >= MAX_TENANT_REQUESTS:
            raise RequestRefused(
                429,
                "busy",
                f"more than {MAX_TENANT_REQUESTS} requests of this tenant are in progress",
                retry_after_s=1.0,
            )
        self._requests[tenant] += 1
        try:
            yield
        finally:
            self._requests[tenant] -= 1

    async def put_context(self, name: str, request: Request) -> Response:
        """Decode and store a context."""
        tenant = self.tenant(request)
        if not _HASH.fullmatch(name):
            raise RequestRefused(422, "hash", "a context's name is 64 lowercase hex digits")
        with self._in_progress(tenant):
            async with read_body(request, self.body_budget, tenant, max_bytes=self.max_body_bytes) as body:
                self.service.metrics.context_bytes_in.labels(tenant).inc(len(body))
                parent, ids = await self._convert(tenant, len(body), decode_context, body)
                context = self.service.put_context(tenant, name, ids, parent)
        return JSONResponse({"hash": context.hash, "tokens": int(context.ids.size)})

    async def score(self, request: Request) -> Response:
        """Decode a request, compute its reply once per request id, cancel the computation if the client leaves."""
        tenant, metrics = self.tenant(request), self.service.metrics
        record, began = RequestRecord(tenant, metrics.known(tenant, "")), time.monotonic()
        with self.service.tracing.request(request.headers) as span:
            try:
                return await self._score(request, record)
            except (Conflict, CodecError, RequestRefused) as error:
                refusal = _as_refusal(error)
                record.refuse(refusal)
                metrics.rejected.labels(record.label, refusal.code).inc()
                raise refusal from error
            finally:
                metrics.requests.labels(record.label, str(record.status)).inc()
                span.set_attributes(record.attributes())
                log.info("score %s seconds=%.3f", record, time.monotonic() - began)

    async def _score(self, request: Request, record: RequestRecord) -> Response:
        tenant, metrics, part = record.tenant, self.service.metrics, self.service.tracing.part
        limits = {"max_bytes": self.max_body_bytes, "max_items": self.max_items}
        async with AsyncExitStack() as stack, AsyncExitStack() as until_computed:
            stack.enter_context(self._in_progress(tenant))
            with part("read"):
                incoming = read_body(request, self.body_budget, tenant, **limits)
                body = await until_computed.enter_async_context(incoming)
            size = len(body)
            with part("decode"):
                try:
                    decoded = await self._convert(tenant, size, decode_request, body)
                    record.label = metrics.known(tenant, decoded.run)
                    record.describe(decoded)
                    reply_size = await self._convert(tenant, size, self.service.check, decoded)
                    record.label = metrics.run(tenant, decoded.run)
                finally:
                    metrics.bytes_in.labels(record.label).inc(size)
                digest = await self._convert(tenant, size, xxhash.xxh3_128_digest, body)
            deadline_s = _deadline_s(request)
            del body  # the decoded arrays are copies
            await stack.enter_async_context(self.reply_budget.hold(tenant, reply_size))
            once = self.replies.once(
                (tenant, decoded.run, decoded.request_id),
                digest,
                lambda: self._compute(tenant, decoded),
                metrics.repeated.labels(record.label).inc,
            )
            reply = await _while_connected(request, _within(deadline_s, once))
            metrics.bytes_out.labels(record.label).inc(len(reply))
            record.status = 200
            return HeldReply(reply, stack.pop_all())

    async def _compute(self, tenant: str, request: ScoreRequest) -> tuple[bytes, bool]:
        response = await self.service.score(tenant, request)
        size = sum(
            RESULT_BYTES + (result.logprobs.nbytes if isinstance(result, ItemScore) else 0)
            for result in response.results
        )
        # A reply with a temporary error is not kept: a repeated request may succeed.
        temporary = any(
            isinstance(result, ItemError) and result.code in ("internal", "unknown_context")
            for result in response.results
        )
        with self.service.tracing.part("encode"):
            return await self._convert(tenant, size, encode_response, response), not temporary

    async def _convert(self, tenant: str, size: int, convert: Callable[[V], T], value: V) -> T:
        """Convert a value of `size` bytes, in the tenant's turn and in a thread if it is large."""
        return convert(value) if size <= INLINE_BYTES else await self.service.turns.run(tenant, convert, value)

    def metrics(self, request: Request) -> Response:
        """Prometheus text, for the tenant `operator`."""
        if not self.auth.may_read_metrics(self.tenant(request)):
            raise RequestRefused(
                403, "forbidden", "metrics show the runs of all tenants: use a key of the tenant `operator`"
            )
        self.service.metrics.body_bytes.set(self.body_budget.held)
        self.service.metrics.reply_bytes.set(self.replies.nbytes)
        return Response(self.service.render_metrics(), media_type="text/plain; version=0.0.4")


def create_app(service: TeacherService, auth: Authenticator | None = None) -> FastAPI:
    """Build the application of a service. Its lifespan starts and stops the service.

    Without `auth` all clients are one tenant.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    api = TeacherApi(service, auth or Authenticator())
    app = FastAPI(
        title="opcd teacher",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from the internet, which clusters lack
        redoc_url=None,
    )
    app.state.service = service
    keyed = [Security(KEY)]
    app.add_exception_handler(RequestRefused, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(CodecError, _undecodable)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _no_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _failed)

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", response_model=None, responses={503: {"description": "The server is broken: restart it."}})
    async def healthz() -> Response:
        """Liveness: 200, or 503 if the server must be restarted."""
        broken = service.failure is not None
        return JSONResponse({"status": "failed" if broken else "ok"}, 503 if broken else 200)

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", response_model=None, responses={503: {"description": REFUSALS[503]}})
    async def readyz() -> Response:
        """Readiness: 200, or 503 while the server starts, drains or is broken."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**text_reply("metrics"), **refusals(401, 403)},
        dependencies=keyed,
    )
    async def metrics(request: Request) -> Response:
        """Prometheus text. A server with keys requires a key of the tenant `operator`."""
        return api.metrics(request)

    @app.get("/v1/info", responses=refusals(401), dependencies=keyed)
    async def info(request: Request) -> TeacherInfo:
        """The teacher's model, modes and bounds."""
        api.tenant(request)
        return service.info()

    @app.put(
        "/v1/contexts/{name}",
        response_model=Stored,
        openapi_extra=binary_body("a context", ROUTE_HEADER),
        dependencies=keyed,
        responses=refusals(400, 401, 404, 408, 413, 422, 429, 503),
    )
    async def put_context(name: str, request: Request) -> Response:
        """Store a context under its hash. Putting a context again changes nothing."""
        return await api.put_context(name, request)

    @app.post(
        "/v1/score",
        response_class=Response,
        openapi_extra=binary_body("a score request", DEADLINE_HEADER, ROUTE_HEADER),
        dependencies=keyed,
        responses={**binary_reply("a score response"), **refusals(400, 401, 408, 409, 413, 429, 503, 504)},
    )
    async def score(request: Request) -> Response:
        """Score responses under their contexts."""
        return await api.score(request)

    return app


class HeldReply(Response):
    """A msgpack reply that holds its bytes in a budget until the client has taken them."""

    media_type = MEDIA_TYPE

    def __init__(self, reply: bytes, held: AsyncExitStack) -> None:
        super().__init__(reply)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply. uvicorn takes the empty last message when the client has taken everything before it."""
        async with self._held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            body, self.body = self.body, b""
            await send({"type": "http.response.body", "body": body, "more_body": True})
            del body
            await send({"type": "http.response.body", "body": b""})


def _as_refusal(error: Conflict | CodecError | RequestRefused) -> RequestRefused:
    if isinstance(error, Conflict):
        return RequestRefused(409, "request_id", str(error))
    return error if isinstance(error, RequestRefused) else RequestRefused(400, "body", str(error))


async def _refused(_: Request, error: RequestRefused) -> JSONResponse:
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = f"{math.ceil(error.retry_after_s)}"
    if error.status == 408:
        headers["Connection"] = "close"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.code, "message": str(error)}, error.status, headers)


async def _undecodable(request: Request, error: CodecError) -> JSONResponse:
    return await _refused(request, _as_refusal(error))


async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method"}.get(error.status_code, "http")
    reply = await _refused(request, RequestRefused(error.status_code, code, f"{request.method}: {error.detail}"))
    reply.headers.update(error.headers or {})
    return reply


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return await _refused(request, RequestRefused(500, "internal", f"the server failed: {type(error).__name__}"))


def _deadline_s(request: Request) -> float:
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return MAX_DEADLINE_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestRefused(400, "deadline", f"{DEADLINE_HEADER} must be a positive number of seconds")
    return min(seconds, MAX_DEADLINE_S)


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it if the client closes the connection."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestRefused(499, "gone", "the client closed the connection")
        return task.result()
    finally:
        disconnected.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _within(deadline_s: float, work: Awaitable[T]) -> T:
    """Return the result of `work`. The deadline is this waiter's: another waiter for the same reply may have longer."""
    try:
        async with asyncio.timeout(deadline_s):
            return await work
    except TimeoutError as error:
        raise RequestRefused(504, "deadline", f"not scored within the requested {deadline_s:g} s") from error


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
