"""Teachers that follow their student (`live`, `ema`): weights from a real sender, scores against forward passes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.config.model import SyncConfig, TeacherConfig
from common.protocol.codec import decode_response
from common.protocol.schema import Context, ItemScore, ScoreItem, ScoreRequest, TeacherInfo, as_ids, context_hash
from common.weight_sync.collective import SyncError
from learner.publishing.sender import open_sender
from teacher_server.actor import TeacherActor
from teacher_server.backends.hf.backend import TransformersBackend
from teacher_server.backends.hf.live_weights import LiveWeights
from teacher_server.scoring.checks import RequestRefused
from teacher_server.scoring.service import TeacherService, TokenizerIdentity
from tests.support.processes import free_port
from tests.support.teacher_oracle import Oracle, assert_score, random_item
from tests.support.teacher_running import post, put, request_of
from tests.support.weight_groups import HOST, manifest_of, together

CONTEXT = as_ids(np.random.default_rng(5).integers(0, 256, 40))


def weights_of(folder: Path, seed: int | None = None) -> dict[str, Tensor]:
    """A model's parameters by checkpoint name; with `seed`, moved as a training step would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed or 0)
    return {
        name: (p.detach() + (0.05 * torch.randn(p.shape, generator=generator) if seed is not None else 0)).clone()
        for name, p in model.named_parameters()
    }


def oracle_of(folder: Path, weights: dict[str, Tensor]) -> Oracle:
    oracle = Oracle.load(folder)
    with torch.no_grad():
        for name, parameter in oracle.model.named_parameters():
            parameter.copy_(weights[name])
    return oracle


class Server:
    """A teacher actor in this process and HTTP requests to it."""

    def __init__(self, model: Path, kind: str, decay: float = 0.9, refresh_every: int = 1, delta: bool = False) -> None:
        self.sync = SyncConfig(timeout_s=20, delta=delta)
        section = TeacherConfig(model=str(model), kind=kind, ema_decay=decay, refresh_every=refresh_every, threads=1)
        self.actor = TeacherActor(section, "key", self.sync)
        self.url = self.actor.start()

    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"Authorization": "Bearer key"}, trust_env=False)

    def info(self) -> TeacherInfo:
        async def get() -> TeacherInfo:
            async with self._http() as http:
                return TeacherInfo.model_validate_json((await http.get("/v1/info")).content)

        return asyncio.run(get())

    def ready(self) -> bool:
        return httpx.get(self.url + "/readyz", trust_env=False).status_code == 200

    def item_with_context(self) -> ScoreItem:
        """Put `CONTEXT`, and return an item with it."""
        item = random_item(np.random.default_rng(1), prompt=6, response=9)
        context = Context(context_hash(self.info().tokenizer_fingerprint, CONTEXT), CONTEXT)

        async def send() -> None:
            async with self._http() as http:
                assert (await put(http, context)).status_code == 200

        asyncio.run(send())
        return replace(item, context=context.hash)

    def post(self, item: ScoreItem) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self._http() as http:
                return await post(http, request_of([item], k=0))

        return asyncio.run(send())

    def score(self, item: ScoreItem) -> tuple[ItemScore, int]:
        response = decode_response(self.post(item).content)
        assert isinstance(response.results[0], ItemScore), response.results[0]
        return response.results[0], response.weight_version

    def join(self) -> Any:
        """A weight group of a sender and this teacher."""
        port = free_port()
        sender, joined = together(
            lambda: open_sender(self.sync, HOST, port, 2), lambda: self.actor.join_sync(HOST, port, 1, 2)
        )
        assert joined is None
        return sender

    def publish(self, sender: Any, weights: dict[str, Tensor], version: int) -> list[Any]:
        manifest = manifest_of(weights, bucket_bytes=40_000, version=version)
        return together(
            lambda: sender.send(weights.items(), manifest), lambda: self.actor.receive_weights(manifest, version)
        )


@pytest.fixture
def served(tiny_model: Path) -> Iterator[Any]:
    started: list[Server] = []

    def start(kind: str, **options: Any) -> Server:
        started.append(Server(tiny_model, kind, **options))
        return started[-1]

    yield start
    for server in started:
        server.actor.stop()


def test_a_live_teacher_scores_with_every_version_and_recomputes_its_cached_context(
    served: Any, tiny_model: Path
) -> None:
    server = served("live")
    item = server.item_with_context()
    before, version = server.score(item)
    assert version == 0
    assert_score(before, Oracle.load(tiny_model).logprobs(CONTEXT, item.prompt_ids, item.response_ids), item)
    fingerprint = server.info().model_fingerprint
    sender = server.join()
    for version in (1, 2):
        weights = weights_of(tiny_model, seed=version)
        assert not any(isinstance(one, SyncError) for one in server.publish(sender, weights, version))
        score, stamp = server.score(item)
        assert stamp == version
        logprobs = oracle_of(tiny_model, weights).logprobs(CONTEXT, item.prompt_ids, item.response_ids)
        assert_score(score, logprobs, item)
        assert np.abs(score.sampled_logprob - before.sampled_logprob).max() > 0.1  # old keys and values would show
    info = server.info()
    assert (info.kind, info.weight_version, info.model_fingerprint) == ("live", 2, fingerprint)
    sender.close()


def test_an_ema_teacher_holds_the_closed_form_and_takes_a_repeated_version_once(
    served: Any, tiny_model: Path, tmp_path: Path
) -> None:
    server = served("ema")
    item = server.item_with_context()
    sender = server.join()
    versions = [weights_of(tiny_model, seed) for seed in (None, 1, 2, 3)]
    for version in (1, 2, 2, 3):
        assert not any(isinstance(one, SyncError) for one in server.publish(sender, versions[version], version))
    decay, last = 0.9, len(versions) - 1
    shares = [decay**last, *((1 - decay) * decay ** (last - v) for v in range(1, last + 1))]
    assert sum(shares) == pytest.approx(1)
    average = {
        name: sum(share * weights[name].double() for share, weights in zip(shares, versions, strict=True)).float()
        for name in versions[0]
    }
    score, stamp = server.score(item)
    assert stamp == 3
    assert_score(score, oracle_of(tiny_model, average).logprobs(CONTEXT, item.prompt_ids, item.response_ids), item)
    server.actor.save_state(str(tmp_path / "state"))
    again = served("ema")  # a resumed run: the average comes from disk, and the repeated version leaves it unchanged
    again.actor.load_state(str(tmp_path / "state"))
    other = again.join()
    again.publish(other, versions[3], 3)
    again.item_with_context()
    resumed, stamp = again.score(item)
    assert stamp == 3
    np.testing.assert_array_equal(resumed.logprobs, score.logprobs)
    sender.close()
    other.close()


@pytest.mark.parametrize(("kind", "delta"), [("live", False), ("live", True), ("ema", False)])
def test_a_refreshed_teacher_takes_every_third_version_and_a_resumed_run_keeps_it(
    served: Any, tiny_model: Path, tmp_path: Path, kind: str, delta: bool
) -> None:
    server = served(kind, refresh_every=3, delta=delta)
    item = server.item_with_context()
    sender = server.join()
    versions = [weights_of(tiny_model, seed) for seed in (None, 1, 2, 3, 4)]
    decay = 0.9 if kind == "ema" else 0.0
    refreshed = {name: (decay * versions[0][name] + (1 - decay) * versions[3][name]) for name in versions[0]}
    expected = [versions[0], versions[0], versions[0], refreshed, refreshed]
    for version in (1, 2, 3, 4):
        assert not any(isinstance(one, SyncError) for one in server.publish(sender, versions[version], version))
        score, stamp = server.score(item)
        assert stamp == 3 * (version // 3)
        logprobs = oracle_of(tiny_model, expected[version]).logprobs(CONTEXT, item.prompt_ids, item.response_ids)
        assert_score(score, logprobs, item)
    server.actor.save_state(str(tmp_path / "state"))
    again = served(kind, refresh_every=3, delta=delta)
    again.actor.load_state(str(tmp_path / "state"))
    other = again.join()
    again.publish(other, versions[4], 4)  # as a resumed learner does
    again.item_with_context()
    resumed, stamp = again.score(item)
    assert stamp == 3
    np.testing.assert_array_equal(resumed.logprobs, score.logprobs)
    sender.close()
    other.close()


def test_a_teacher_with_incomplete_weights_refuses_all_requests(served: Any, tiny_model: Path) -> None:
    server = served("live")
    item = server.item_with_context()
    sender = server.join()
    weights = weights_of(tiny_model, seed=1)
    manifest = manifest_of(weights, bucket_bytes=40_000, version=1)

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(weights.items()):
            if index == 5:
                raise SyncError("the learner was killed here")
            yield pair

    results = together(lambda: sender.send(breaks_off(), manifest), lambda: server.actor.receive_weights(manifest, 1))
    assert all(isinstance(one, SyncError) for one in results)
    refused = server.post(item)
    assert refused.status_code == 503
    assert "weights of version 1 did not arrive whole" in refused.json()["message"]
    assert not server.ready()


def test_a_request_during_an_update_is_scored_with_one_version(tiny_model: Path) -> None:
    """Two items in two batches; the weights change between them."""
    backend = TransformersBackend.load(str(tiny_model), kind="live")
    section = TeacherConfig(model=str(tiny_model), kind="live", batch_items=1, batch_window_ms=0)
    service = TeacherService(backend, section, TokenizerIdentity("0" * 64, "0" * 64))
    weights = weights_of(tiny_model, seed=4)
    rng = np.random.default_rng(2)
    items = tuple(random_item(rng, prompt=4, response=5) for _ in range(2))
    items = tuple(ScoreItem(None, item.prompt_ids, item.response_ids, item.topk_ids) for item in items)
    scored = backend.score
    updates: list[threading.Thread] = []

    def update_behind_the_first(batch: Any) -> Any:
        if not updates:
            updates.append(threading.Thread(target=service.load_weights, args=(weights.items(), 1)))
            updates[0].start()
            # The update is queued for this thread, before the batch of the second item.
            while not service._scheduler._thread._work_queue.qsize():
                pass
        return scored(batch)

    backend.score = update_behind_the_first

    async def ask() -> Any:
        service.start()
        try:
            return await service.score("run", ScoreRequest("r", "run", "at_ids", 1.0, 0, items))
        finally:
            await service.stop()

    response = asyncio.run(ask())
    assert response.weight_version == 1
    oracle = oracle_of(tiny_model, weights)
    for item, score in zip(items, response.results, strict=True):
        assert_score(score, oracle.logprobs(as_ids([]), item.prompt_ids, item.response_ids), item)


@pytest.mark.parametrize("failure", [SyncError("the learner was killed here"), MemoryError("no room for a copy")])
def test_requests_behind_a_failed_update_are_not_scored(tiny_model: Path, failure: Exception) -> None:
    """One item is computed, one waits, and an update fails between them."""
    backend = TransformersBackend.load(str(tiny_model), kind="live")
    section = TeacherConfig(model=str(tiny_model), kind="live", batch_items=1, batch_window_ms=0)
    service = TeacherService(backend, section, TokenizerIdentity("0" * 64, "0" * 64))
    rng = np.random.default_rng(2)
    first, second = (random_item(rng, prompt=4, response=5) for _ in range(2))
    scored, batches, updates = backend.score, [], []

    def breaks_off() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights_of(tiny_model, seed=4).items())[:5]
        raise failure

    def update() -> None:
        with pytest.raises(type(failure)):
            service.load_weights(breaks_off(), 1)

    def update_behind_the_first(batch: Any) -> Any:
        batches.append(batch)
        if len(batches) == 1:
            updates.append(threading.Thread(target=update))
            updates[0].start()
            while not service._scheduler._thread._work_queue.qsize():
                pass
        return scored(batch)

    backend.score = update_behind_the_first

    async def ask() -> Any:
        service.start()
        requests = [
            ScoreRequest(name, "run", "at_ids", 1.0, 0, (item,)) for name, item in (("a", first), ("b", second))
        ]
        try:
            return await asyncio.gather(*(service.score("run", one) for one in requests), return_exceptions=True)
        finally:
            await service.stop()

    _, late = asyncio.run(ask())
    updates[0].join()
    assert isinstance(late, RequestRefused), late
    assert (late.status, late.code) == (503, "broken")
    assert str(failure) in str(late)
    assert not service.ready


def test_weights_of_another_model_are_refused_by_name(tiny_model: Path, tiny_untied_model: Path) -> None:
    live = LiveWeights(AutoModelForCausalLM.from_pretrained(tiny_model), None)
    weights = weights_of(tiny_model)
    first = next(iter(weights))
    with pytest.raises(SyncError, match=r"no parameter lm_head.weight"):
        live.load(weights_of(tiny_untied_model).items())
    with pytest.raises(SyncError, match=f"parameter {first} arrived twice"):
        live.load([(first, weights[first]), (first, weights[first])])
    with pytest.raises(SyncError, match="1 parameters did not arrive"):
        live.load((name, weight) for name, weight in weights.items() if name != first)
    with pytest.raises(SyncError, match=f"parameter {first} is"):
        live.load([(first, weights[first][:1])])
    frozen = TransformersBackend.load(str(tiny_model))
    with pytest.raises(SyncError, match="frozen teacher"):
        frozen.load_weights(weights.items(), 1)


def test_an_average_of_low_precision_weights_is_kept_in_float32(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    live = LiveWeights(model, 0.999)
    start = {name: p.float().clone() for name, p in model.named_parameters()}
    for _ in range(20):  # one step is below the resolution of the bfloat16 weights
        live.load([(name, weight + 1e-2) for name, weight in start.items()])
    expected = 1 - 0.999**20
    for name, average in live.state().items():
        torch.testing.assert_close(average, start[name] + expected * 1e-2, rtol=0, atol=1e-5)
