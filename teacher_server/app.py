"""The HTTP face of the teacher. Bodies are in the binary form of ``common.codec``, errors in JSON."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from common.codec import MEDIA_TYPE, CodecError, decode_context, decode_request, encode_response
from common.schema import ItemScore, TeacherInfo
from teacher_server.checks import RequestRefused
from teacher_server.service import TeacherService

T = TypeVar("T")

INLINE_BYTES = 256 * 1024
"""Bodies above this are decoded and encoded in a thread, so that the event loop goes on."""

BODY_TIMEOUT_S = 60.0
"""A body that is not here by then is cut off."""

_HASH = re.compile(r"[0-9a-f]{64}")


def create_app(service: TeacherService) -> FastAPI:
    """The application around a service; it starts and drains the service with its own lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="opcd teacher", version="1", lifespan=lifespan)

    @app.exception_handler(RequestRefused)
    async def _refused(_: Request, error: RequestRefused) -> JSONResponse:
        headers = {} if error.retry_after_s is None else {"Retry-After": f"{error.retry_after_s:.1f}"}
        return JSONResponse({"error": error.code, "message": str(error)}, error.status, headers)

    @app.exception_handler(CodecError)
    async def _undecodable(_: Request, error: CodecError) -> JSONResponse:
        return JSONResponse({"error": "body", "message": str(error)}, 400)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether requests are taken: 200, or 503 while starting and draining."""
        ready = service.scheduler is not None and not service.draining
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/v1/info")
    async def info() -> TeacherInfo:
        """Who this teacher is and what it can do."""
        return service.info()

    @app.put("/v1/contexts/{name}")
    async def put_context(name: str, request: Request) -> JSONResponse:
        """Store a context under its hash."""
        if not _HASH.fullmatch(name):
            raise RequestRefused(422, "hash", "a context's name is 64 lowercase hex digits")
        body = await _read(request, service.info().max_body_bytes)
        parent, ids = await _off_loop(decode_context, body, len(body))
        context = service.put_context("anonymous", name, ids, parent)
        return JSONResponse({"hash": context.hash, "tokens": int(context.ids.size)})

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        """Log-probabilities of given responses."""
        body = await _read(request, service.info().max_body_bytes)
        decoded = await _off_loop(decode_request, body, len(body))
        del body
        response = await service.score("anonymous", decoded)
        size = sum(result.logprobs.nbytes for result in response.results if isinstance(result, ItemScore))
        return Response(await _off_loop(encode_response, response, size), media_type=MEDIA_TYPE)

    return app


async def _read(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be larger than `limit`."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise RequestRefused(413, "body", f"the body has {declared} bytes, at most {limit}")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise RequestRefused(413, "body", f"the body has more than {limit} bytes")
                chunks.append(chunk)
    except TimeoutError as error:
        raise RequestRefused(408, "body", f"the body was not complete after {BODY_TIMEOUT_S:.0f} s") from error
    return b"".join(chunks)


async def _off_loop(convert: Callable[..., T], value: object, size: int) -> T:
    return convert(value) if size <= INLINE_BYTES else await asyncio.to_thread(convert, value)
