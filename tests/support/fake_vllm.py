"""A stand-in for ``vllm serve``, for faults that a real one does not have on demand."""

from __future__ import annotations

import base64
import functools
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from common.config.model import TeacherConfig
from common.protocol.schema import Ids, as_ids
from teacher_server.backends.remote.backend import RemoteBackend
from teacher_server.backends.remote.endpoint import Endpoint
from teacher_server.backends.remote.model import MAX_CONNECTIONS, EndpointModel
from tests.support.tiny import make_tokenizer

V = 300
BLOCK = 4
ADDRESS = "http://endpoint:8000"

Values = NDArray[np.float64]
Damage = Callable[[dict[str, Any]], object]


@dataclass
class FakeVllm:
    """Answers as vLLM's OpenAI server; logits are a function of all tokens up to the position and of `weights`.

    `damage` changes the choice of the first `faults` replies with scores of others than the probe. `reply` may answer a
    request instead.
    """

    weights: int = 0
    scale: float = 4.0
    names: tuple[str, ...] = ("big",)
    max_model_len: int = 512
    max_logprobs: int = 64
    system_fingerprint: str | None = "vllm-0.32.0-12345678"
    damage: Damage | None = None
    faults: int = 0
    noise: float = 0.0
    reply: Callable[[httpx.Request], httpx.Response | None] = lambda _: None
    v2: bool = False
    """Serves ``/inference/v1/generate`` with the V2 runner."""
    tokenizer: Any = field(default_factory=make_tokenizer)
    requests: list[dict[str, Any]] = field(default_factory=list)
    generated: list[dict[str, Any]] = field(default_factory=list)
    computed_tokens: int = 0
    _cache: dict[str | None, list[Ids]] = field(default_factory=dict)
    at_once: int = 0
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self._running += 1
            self.at_once = max(self.at_once, self._running)
        try:
            return self.reply(request) or self._answer(request)
        finally:
            with self._lock:
                self._running -= 1

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            cards = [{"id": name, "root": f"/{name}", "max_model_len": self.max_model_len} for name in self.names]
            return httpx.Response(200, json={"object": "list", "data": cards})
        body = json.loads(request.content)
        if request.url.path == "/inference/v1/generate":
            return self._generate(body) if self.v2 else httpx.Response(404, json={"detail": "Not Found"})
        assert request.url.path == "/v1/completions"
        assert body["model"] in self.names
        assert body["max_tokens"] == 1
        choice: dict[str, Any] = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
        if isinstance(body["prompt"], str):
            assert body["add_special_tokens"] is False
            choice["prompt_token_ids"] = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        else:
            if body["prompt_logprobs"] > self.max_logprobs:
                message = f"Requested prompt logprobs of {body['prompt_logprobs']}, which is greater than max allowed"
                return httpx.Response(400, json={"error": {"message": message, "code": 400}})
            with self._lock:
                self.requests.append(body)
            choice["prompt_logprobs"] = self._rows(as_ids(body["prompt"]), body["prompt_logprobs"])
            self._damage(choice, len(body["prompt"]) < 32)
        reply = {"model": body["model"], "choices": [choice], "system_fingerprint": self.system_fingerprint}
        return httpx.Response(200, text=json.dumps(reply))  # httpx would refuse a NaN

    def _generate(self, body: dict[str, Any]) -> httpx.Response:
        """As the V2 runner: nothing of a token that was read from the cache, which holds whole blocks."""
        ids, sampling, salt = as_ids(body["token_ids"]), body["sampling_params"], body.get("cache_salt")
        fixed, start, k = (sampling.get(f"prompt_logprob{name}") for name in ("_token_ids", "_start", "s"))
        if (width := max(k or 0, len(fixed[0]) if fixed else 0)) > self.max_logprobs:
            return httpx.Response(400, json={"error": {"message": f"{width} is greater than max allowed"}})
        scores = fixed is not None or k is not None
        with self._lock:
            self.generated.append(body)
            reads = salt is not None and not (scores and sampling.get("skip_reading_prefix_cache") is not False)
            cached = max((shared(ids, other) for other in self._cache.get(salt, ())), default=0) if reads else 0
            cached = min(cached, ids.size - 1) // BLOCK * BLOCK
            self._cache.setdefault(salt, []).append(ids)
            self.computed_tokens += int(ids.size) - cached
        reply: dict[str, Any] = {"model": body["model"], "choices": [], "prompt_logprobs": None}
        if k is not None:
            rows = self._rows(ids, k)
            reply["prompt_logprobs"] = [None, *rows[1 + cached :]]
        if fixed is not None and cached <= start:
            assert len(fixed) == ids.size - 1 - start
            wanted = np.array(fixed)
            padded = np.pad(self.logprobs(ids)[start:], ((0, 0), (0, 1)), constant_values=-np.inf)
            values = np.take_along_axis(padded, wanted, axis=1).astype(np.float32)  # -1 is the last column
            packed = io.BytesIO()
            np.save(packed, values)
            reply["prompt_token_id_logprobs"] = base64.b64encode(packed.getvalue()).decode()
        self._damage(reply, scores and ids.size < 32)
        return httpx.Response(200, text=json.dumps(reply))

    def _damage(self, reply: dict[str, Any], damageable: bool) -> None:
        with self._lock:
            damaged = self.faults > 0 and damageable
            self.faults -= damaged
        if damaged:
            assert self.damage is not None
            self.damage(reply)

    def _rows(self, ids: Ids, k: int) -> list[dict[str, Any] | None]:
        rows: list[dict[str, Any] | None] = [None]
        for logprobs, token in zip(self.logprobs(ids), ids[1:].tolist(), strict=True):
            if self.noise:
                logprobs = normalised(logprobs + self.noise * np.random.default_rng().normal(size=V))
            order = np.argsort(-logprobs, kind="stable")
            values = logprobs.astype(np.float32).astype(float)
            rank = int((logprobs >= logprobs[token]).sum())
            row = {str(token): {"logprob": values[token], "rank": rank, "decoded_token": "t"}}
            for place, index in enumerate(order[:k].tolist(), start=1):
                row[str(index)] = {"logprob": values[index], "rank": place, "decoded_token": "t"}
            rows.append(row)
        return rows

    def logprobs(self, ids: Ids) -> Values:
        """``[N - 1, V]`` f64: log-probs that predict each token after the first."""
        return np.array([next_logprobs(self.weights, self.scale, ids[:stop].tobytes()) for stop in range(1, ids.size)])


def shared(first: Ids, second: Ids) -> int:
    """Length of the common prefix."""
    size = min(first.size, second.size)
    return int((first[:size] == second[:size]).cumprod().sum())


@functools.lru_cache(maxsize=4096)
def next_logprobs(weights: int, scale: float, before: bytes) -> Values:
    return normalised(np.random.default_rng([weights, *before]).normal(size=V) * scale)


def normalised(logits: Values) -> Values:
    return logits - np.logaddexp.reduce(logits)


def connect(fake: FakeVllm, *, key: str | None = None, **settings: Any) -> RemoteBackend:
    """The backend in front of `fake`; `settings` are of `TeacherConfig`."""
    config = TeacherConfig(
        **{"model": "m", "backend": "remote", "endpoint": ADDRESS, "dtype": "float32", "max_k": 64, **settings}
    )
    endpoint = Endpoint(ADDRESS, key=key, max_connections=MAX_CONNECTIONS, transport=httpx.MockTransport(fake))
    model = EndpointModel(
        endpoint,
        name=config.endpoint_model,
        model_config=SimpleNamespace(vocab_size=V),
        timeout_s=config.request_timeout_s,
    )
    return RemoteBackend(model, config, fake.tokenizer)
