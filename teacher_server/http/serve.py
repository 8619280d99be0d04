"""Starts a teacher in this process: loads the model, binds the address and runs uvicorn."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from common.config.model import TeacherConfig
from common.data.fingerprint import added_tokens, chat_template_fingerprint, tokenizer_fingerprint
from common.data.model_lookup import load_tokenizer
from common.protocol.scoring import TeacherError
from teacher_server.backends.base import Backend, BackendError
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.backends.remote.backend import RemoteBackend
from teacher_server.http.app import create_app
from teacher_server.http.auth import KEYS_VARIABLE, Authenticator, authenticator
from teacher_server.http.http_limits import MAX_CONNECTIONS, LimitedHttpProtocol
from teacher_server.scoring.service import TeacherService, TokenizerIdentity

log = logging.getLogger(__name__)

DRAIN_S = 600
"""Longest wait for requests in progress after SIGTERM. The server drops the remaining ones."""

AFTER_DROPPING_S = 30
"""Time for the handlers of dropped requests to end."""


def build_service(config: TeacherConfig, *, on_failure: Callable[[str], None] = lambda _: None) -> TeacherService:
    """Load the model and its tokenizer. Raises TeacherError if the model cannot be a teacher.

    `on_failure` is called with the reason when the service breaks.
    """
    if config.model is None:
        raise TeacherError("teacher.model is missing: set it to the folder or hub name of the model that scores")
    set_threads = _thread_setter(config.threads)
    set_threads()
    try:
        tokenizer = load_tokenizer(config.model)
        backend, on_stop = _backend(config, config.model, tokenizer)
    except (BackendError, OSError, ValueError) as error:
        if config.backend == "remote" and isinstance(error, BackendError):
            raise TeacherError(str(error)) from error
        raise TeacherError(f"teacher.model {config.model} cannot be loaded: {error}") from error
    identity = TokenizerIdentity(
        tokenizer_fingerprint(tokenizer), chat_template_fingerprint(tokenizer), added_tokens(tokenizer)
    )
    return TeacherService(backend, config, identity, thread_setup=set_threads, on_stop=on_stop, on_failure=on_failure)


def _backend(config: TeacherConfig, model: str, tokenizer: Any) -> tuple[Backend, Callable[[], None] | None]:
    """Load the backend; returns it with a function that stops its processes, if it has any."""
    if config.kind == "base":
        raise TeacherError("teacher.kind=base means that the learner scores: there is no server to start")
    if config.backend == "vllm":
        # vLLM takes seconds to import and may not be installed.
        from teacher_server.backends.vllm.backend import VllmBackend

        engine = VllmBackend.load(model, config)
        return engine, engine.close
    if config.backend == "remote":
        remote = RemoteBackend.load(config, tokenizer)
        return remote, remote.close
    backend = TransformersBackend.load(
        model,
        dtype=config.dtype,
        device_map=config.device_map,
        max_sequence_tokens=config.max_sequence_tokens,
        prefill_tokens=config.batch_tokens,
        kind=config.kind,
        ema_decay=config.ema_decay,
    )
    return backend, None


def build_app(config: TeacherConfig) -> FastAPI:
    """Build the application for Ray Serve. Its ``state.service`` is the service.

    Raises TeacherError, also without keys: Serve's proxy listens on an address that the teacher does not know.
    """
    if config.allow_anonymous and config.server_keys_file is None and KEYS_VARIABLE not in os.environ:
        raise TeacherError(
            "teacher.allow_anonymous is refused under Ray Serve: its proxy listens on the address of Serve's "
            f"http_options, not on teacher.host={config.listen_host}; set teacher.server_keys_file or {KEYS_VARIABLE} "
            "(`opcd key TENANT` makes a key)"
        )
    auth = authenticator(config.listen_host, config.server_keys_file, allow_anonymous=False)
    return create_app(build_service(config), auth)


@dataclass
class RunningServer:
    """A uvicorn server in its own thread."""

    url: str
    _server: _Server
    _thread: threading.Thread

    def stop(self, timeout_s: float = 30.0) -> None:
        """Drain, then stop."""
        self._server.drain()
        self._thread.join(timeout_s)


def start_in_thread(service: TeacherService, config: TeacherConfig, auth: Authenticator) -> RunningServer:
    """Serve `service` in a new thread; returns when the server takes requests. Raises TeacherError."""
    listener = _listen(config)
    server = _server(service, config, auth)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="teacher-http", daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        if not thread.is_alive():
            raise TeacherError("the teacher's HTTP server stopped during its start: its log has the reason")
    return RunningServer(_url(config, listener), server, thread)


def serve(config: TeacherConfig, *, announce: Callable[[str], None] = print) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in progress and return. Port 0 takes a free port.

    Raises TeacherError, also if requests are unfinished after `DRAIN_S`.
    """
    auth = authenticator(config.listen_host, config.server_keys_file, allow_anonymous=config.allow_anonymous)
    if config.log_requests:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
        logging.getLogger("teacher_server").setLevel(logging.INFO)
    service = build_service(config)
    listener = _listen(config)
    server = _server(service, config, auth)
    info = service.info()
    announce(f"teacher {info.model} ({info.backend}, {info.dtype}) at {_url(config, listener)}")

    def on_signal(_: int, __: FrameType | None) -> None:
        server.drain()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, on_signal)
    server.run(sockets=[listener])
    if server.dropped:
        raise TeacherError(
            f"{server.dropped} requests were dropped: they were unfinished {DRAIN_S} s after the signal to stop. Their "
            "clients retry, so start a teacher at the same address"
        )


class _Server(uvicorn.Server):
    """A uvicorn server with a bounded drain. `serve` handles signals: uvicorn would end with an exit code above 0."""

    def __init__(self, config: uvicorn.Config, service: TeacherService) -> None:
        super().__init__(config)
        self._service = service
        self.dropped = 0
        """Requests that were unfinished at the end of the drain."""

    def drain(self) -> None:
        """Refuse new requests from now on, finish those in progress, then end."""
        self._service.drain()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listener and the idle connections, then wait for the others."""
        limit = asyncio.get_running_loop().call_later(DRAIN_S, self._drop)
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()

    def _drop(self) -> None:
        """Close the remaining connections: those with a request in progress or with an unread reply."""
        connections = list(self.server_state.connections)
        self.dropped = len(connections)
        log.error("dropping %d requests: unfinished after a drain of %g s", self.dropped, DRAIN_S)
        for connection in connections:
            connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Capture none."""
        yield


def _raise_file_limit() -> None:
    """Let this process open all connections; the default limit of many systems is 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _server(service: TeacherService, config: TeacherConfig, auth: Authenticator) -> _Server:
    _raise_file_limit()
    return _Server(
        uvicorn.Config(
            create_app(service, auth),
            http=LimitedHttpProtocol,
            ws="none",
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
            server_header=False,
            host=config.listen_host,
            port=config.port,
            log_level="error",  # a warning for each request that is not HTTP would fill the disk
            access_log=False,
            timeout_graceful_shutdown=DRAIN_S + AFTER_DROPPING_S,
            timeout_keep_alive=75,
        ),
        service,
    )


def _listen(config: TeacherConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.listen_host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.listen_host, config.port))
    except OSError as error:
        listener.close()
        raise TeacherError(
            f"cannot listen on {config.listen_host}:{config.port}: {error.strerror}; "
            "set teacher.host and teacher.port (0: any free port)"
        ) from error
    return listener


def _url(config: TeacherConfig, listener: socket.socket) -> str:
    host = config.listen_host
    name = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"{'http' if config.tls_certificate is None else 'https'}://{name}:{listener.getsockname()[1]}"


def _thread_setter(threads: int | None) -> Callable[[], None]:
    """Return a function that sets torch's OpenMP threads. torch keeps this number for each calling thread."""

    def setup() -> None:
        if threads is not None:
            torch.set_num_threads(threads)

    return setup
