"""A teacher server on loopback for tests: the real one, and the ways to hold it, count it and talk past its client."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np

from common.config.model import TeacherConfig
from common.protocol.codec import MEDIA_TYPE, decode_response, encode_context, encode_request
from common.protocol.schema import (
    Context,
    Ids,
    ItemError,
    ItemScore,
    Prompt,
    ScoreItem,
    ScoreMode,
    ScoreRequest,
    ScoreResponse,
    TeacherInfo,
    Trajectory,
    as_ids,
    context_hash,
)
from teacher_server.backends.base import Work
from teacher_server.http.auth import Authenticator, key_digest
from teacher_server.http.serve import build_service, start_in_thread
from teacher_server.scoring.service import TeacherService
from tests.support.teacher_oracle import random_item

KEYS = {"red": "key-of-red", "blue": "key-of-blue", "operator": "key-of-operator"}


def authenticator() -> Authenticator:
    """Two tenants and the operator."""
    return Authenticator(tuple((tenant, bytes.fromhex(key_digest(key))) for tenant, key in KEYS.items()))


class Gate:
    """Stands in front of a real backend: counts batches, and can hold or fail them."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[Work]] = []
        self.fails: Callable[[Sequence[Work]], bool] = lambda _: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Count, wait while held, then the real thing."""
        self.batches.append(list(batch))
        self.entered.release()
        assert self._open.wait(60)
        if self.fails(batch):
            raise RuntimeError("injected failure")
        return self._backend.score(batch)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No batch gets through inside this scope."""
        self._open.clear()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let batches through."""
        self._open.set()


@dataclass
class Running:
    """A server that is up: its address, and its inside for looking at."""

    url: str
    service: TeacherService
    gate: Gate

    @property
    def info(self) -> TeacherInfo:
        return self.service.info()

    def context(self, ids: Ids, parent: Context | None = None) -> Context:
        """A context under this teacher's tokenizer."""
        name = context_hash(self.info.tokenizer_fingerprint, ids)
        return Context(name, ids, None if parent is None else parent.hash)

    def http(self, tenant: str | None = "red") -> httpx.AsyncClient:
        """A bare client, for requests that the project's client never sends."""
        headers = {} if tenant is None else {"Authorization": f"Bearer {KEYS[tenant]}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, trust_env=False)


@contextmanager
def running(model: Path, *, keys: bool = True, **settings: Any) -> Iterator[Running]:
    """The server in a thread of this process, around `model`; `settings` are of `TeacherConfig`."""
    config = TeacherConfig(model=str(model), threads=1, **settings)
    gates: list[Gate] = []

    def gated_service(backend: Any, *arguments: Any, **options: Any) -> TeacherService:
        gates.append(Gate(backend))
        return TeacherService(gates[0], *arguments, **options)

    with mock.patch("teacher_server.http.serve.TeacherService", gated_service):
        service = build_service(config)
    server = start_in_thread(service, config, authenticator() if keys else Authenticator())
    try:
        yield Running(server.url, service, gates[0])
    finally:
        gates[0].release()
        server.stop()


@contextmanager
def process(
    model: Path, port: int = 0, *, before: str = "", **settings: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A teacher in a separate process: (process, address). One anonymous tenant unless `settings` say otherwise.
    `before` are lines of Python that it runs first.
    """
    section = {"model": str(model), "port": port, "threads": 1, "allow_anonymous": True, **settings}
    code = (
        "from common.config.model import TeacherConfig\n"
        "from teacher_server.http.serve import serve\n"
        f"{before}\n"
        f"config = TeacherConfig.model_validate({section!r})\n"
        "serve(config, announce=lambda line: print(line, flush=True))\n"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        line = ""
        while " at http" not in line:
            line = started.stdout.readline()
            assert line, f"the teacher ended with {started.wait()}"
        url = line.strip().rpartition(" ")[2]
        wait_until_ready(url)
        yield started, url
    finally:
        started.kill()
        started.wait()


def wait_until_ready(url: str) -> None:
    """Until requests are taken; a certificate is not looked at."""
    for _ in range(600):
        try:
            if httpx.get(url + "/readyz", trust_env=False, verify=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the teacher did not come up")


def request_of(
    items: Sequence[ScoreItem], *, mode: ScoreMode = "at_ids", request_id: str = "", run: str = "run", k: int = 8
) -> ScoreRequest:
    """A request with the fields that most tests do not care about."""
    return ScoreRequest(request_id, run, mode, 1.0, k, tuple(items))


async def post(http: httpx.AsyncClient, request: ScoreRequest, **headers: str) -> httpx.Response:
    """Send a score request, no retries."""
    return await http.post(
        "/v1/score", content=encode_request(request), headers={"Content-Type": MEDIA_TYPE, **headers}
    )


async def scored(http: httpx.AsyncClient, items: Sequence[ScoreItem], **fields: Any) -> ScoreResponse:
    """Send items, insist on an answer."""
    reply = await post(http, request_of(items, **fields))
    assert reply.status_code == 200, reply.text
    return decode_response(reply.content)


async def put(http: httpx.AsyncClient, context: Context) -> httpx.Response:
    """Put a context whole."""
    return await http.put(f"/v1/contexts/{context.hash}", content=encode_context(context))


def items(seed: int, count: int, *, prompt: int = 6, response: int = 8, context: str | None = None) -> list[ScoreItem]:
    """Random items of one shape."""
    rng = np.random.default_rng(seed)
    return [random_item(rng, prompt=prompt, response=response, context=context) for _ in range(count)]


def tokens(seed: int, count: int) -> Ids:
    """Random ids of the tiny model's vocabulary."""
    return as_ids(np.random.default_rng(seed).integers(0, 512, count))


def trajectory(item: ScoreItem, name: str = "sample") -> Trajectory:
    assert item.topk_ids is not None
    prompt = Prompt(row_id=name, student_ids=item.prompt_ids, teacher_ids=item.prompt_ids, context=item.context)
    zeros = np.zeros(item.response_ids.size, dtype=np.float32)
    return Trajectory(name, 0, prompt, item.response_ids, zeros, item.topk_ids, "length", ((0, 0),))
