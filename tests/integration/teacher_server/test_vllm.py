"""The vLLM backend with a real engine on CPU, through service and HTTP server, against the transformers backend."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.protocol.codec import decode_response
from common.protocol.schema import ItemError, ItemScore, ScoreItem, ScoreMode
from common.protocol.scoring import TeacherError
from teacher_server.backends.base import Work
from teacher_server.client.handshake import handshake
from tests.support.processes import alive, command_of, descendants
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import Running, items, post, process, put, request_of, running, scored, tokens

AGREE_NATS = 1e-4
"""Allowed difference of vLLM from transformers, float32."""


def bare(batch: list[ScoreItem]) -> list[ScoreItem]:
    """The items without a support."""
    return [ScoreItem(item.context, item.prompt_ids, item.response_ids) for item in batch]


def engines_below(pid: int) -> set[int]:
    """Descendants of `pid` without Python's resource tracker, which outlives an engine."""
    return {child for child in descendants(pid) if "resource_tracker" not in command_of(child)}


def gone(pids: set[int]) -> bool:
    """Return True if all processes end within ten seconds."""
    for _ in range(100):
        if not alive(pids):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> Iterator[Running]:
    """A running teacher; its teardown proves that stopping the server ends the engine."""
    before = descendants(os.getpid())
    with running(tiny_model, backend="vllm", max_k=512, context_cache_bytes=64 << 20) as server:
        yield server
        engines = engines_below(os.getpid()) - before
        assert engines
    assert gone(engines), "the engine outlived the server"


@pytest.fixture(scope="module")
def transformers_teacher(tiny_model: Path) -> Iterator[Running]:
    with running(tiny_model) as server:
        yield server


def test_modes_that_a_cpu_runner_lacks_are_not_offered(teacher: Running) -> None:
    assert teacher.info.modes == {"teacher_topk": None, "sampled": None}
    assert (teacher.info.backend, teacher.info.vocab_size, teacher.info.max_sequence_tokens) == ("vllm", 512, 4095)
    wanted = {
        "tokenizer_fingerprint": teacher.info.tokenizer_fingerprint,
        "added_tokens": teacher.info.added_tokens,
        "k": 8,
        "temperature": 0.7,
        "longest_tokens": 100,
    }
    handshake(teacher.info, mode="teacher_topk", **wanted)
    with pytest.raises(TeacherError, match=r"vllm backend cannot score in mode at_ids.*transformers backend"):
        handshake(teacher.info, mode="at_ids", **wanted)


@pytest.mark.parametrize(
    ("mode", "k", "temperature"),
    [("teacher_topk", 8, 1.0), ("teacher_topk", 512, 0.3), ("sampled", 0, 1.0), ("sampled", 0, 2.5)],
)
async def test_both_backends_agree(
    teacher: Running, transformers_teacher: Running, tiny_model: Path, mode: ScoreMode, k: int, temperature: float
) -> None:
    """Items with and without a context that fills whole cache blocks, each scored twice by vLLM."""
    oracle = Oracle.load(tiny_model)
    context = teacher.context(tokens(11, 256))
    batch = bare([*items(21, 3, context=context.hash), *items(22, 2), *items(23, 1, prompt=0, context=context.hash)])
    both = []
    for one in (transformers_teacher, teacher, teacher):
        async with one.http() as http:
            assert (await put(http, context)).status_code == 200
            request = replace(request_of(batch, mode=mode, k=k), temperature=temperature)
            reply = await post(http, request)
            assert reply.status_code == 200, reply.text
            both.append(decode_response(reply.content).results)
    for item, expected, *found in zip(batch, *both, strict=True):
        assert isinstance(expected, ItemScore)
        before = context.ids if item.context else tokens(0, 0)
        logprobs = oracle.logprobs(before, item.prompt_ids, item.response_ids, temperature)
        for score in found:
            assert isinstance(score, ItemScore), score
            assert_score(score, logprobs, item, score.topk_ids)
            for name in ("sampled_logprob", "tail_logprob"):
                ours, theirs = getattr(score, name), getattr(expected, name)
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=AGREE_NATS)


@pytest.fixture
def cached(teacher: Running, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens that the engine reads from its cache, for each request of each run of the engine from now on."""
    engine = teacher.gate.engine
    run, counts = engine.run, []

    def watched(requests, temperature=1.0):
        outputs = run(requests, temperature)
        counts.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine, "run", watched)
    return counts


async def test_a_context_is_computed_once(teacher: Running, cached: list[list[int]]) -> None:
    """The engine reads the context from its cache for every item of the tenant, and for no other tenant."""
    context = teacher.context(tokens(12, 300))
    batch = bare(items(31, 4, context=context.hash))
    for tenant in ("red", "blue"):
        async with teacher.http(tenant) as http:
            await put(http, context)
            for result in (await scored(http, batch, mode="sampled")).results:
                assert not isinstance(result, ItemError)
    block = teacher.gate.engine.block_tokens
    assert cached[0] == [0]
    assert sorted(count for counts in cached for count in counts) == [0] * 2 + [300 // block * block] * 8


def test_a_prompt_of_several_responses_is_computed_once(teacher: Running, cached: list[list[int]]) -> None:
    """Without a context; the engine computes the first response with the prompt and the others after it."""
    block = teacher.gate.engine.block_tokens
    prompt = tokens(51, 2 * block + 5)
    batch = [replace(item, prompt_ids=prompt) for item in bare(items(52, 4))]
    results = teacher.gate.score([Work(item, None, "sampled", 1.0, 0) for item in batch])
    assert not any(isinstance(result, ItemError) for result in results)
    assert cached == [[0, *[2 * block] * 3]]


async def test_an_item_of_which_the_engine_dies_is_refused_and_other_tenants_are_served(
    teacher: Running, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's real process dies while it computes one item of red; blue's context is computed again."""
    run, kills = teacher.gate.engine.run, []
    (deadly,), context = bare(items(41, 1)), teacher.context(tokens(42, 150))

    def deadly_run(requests, temperature=1.0):
        if any(request.ids == [*deadly.prompt_ids, *deadly.response_ids] for request in requests):
            (core,) = [pid for pid in descendants(os.getpid()) if command_of(pid).startswith("VLLM::EngineCore")]
            kills.append(core)
            os.kill(core, signal.SIGKILL)
        return run(requests, temperature)

    monkeypatch.setattr(teacher.gate.engine, "run", deadly_run)
    batch = bare(items(43, 2, context=context.hash))
    async with teacher.http("red") as red, teacher.http("blue") as blue:
        red.timeout = blue.timeout = 120  # an engine starts meanwhile
        await put(blue, context)
        before = await scored(blue, batch, mode="teacher_topk", k=8)
        for reason in ("died of this item", "died of this item before"):
            (refused,) = (await scored(red, [deadly], mode="teacher_topk", k=8)).results
            assert isinstance(refused, ItemError)
            assert refused.message == f"the model's process {reason}"
            after = await scored(blue, batch, mode="teacher_topk", k=8)
            for first, second in zip(before.results, after.results, strict=True):
                assert isinstance(first, ItemScore)
                assert isinstance(second, ItemScore)
                np.testing.assert_array_equal(first.topk_ids, second.topk_ids)
                np.testing.assert_allclose(first.sampled_logprob, second.sampled_logprob, rtol=0, atol=AGREE_NATS)
    assert len(kills) == 1


def test_killing_the_server_ends_its_engine(tiny_model: Path) -> None:
    with process(tiny_model, backend="vllm", max_k=8, context_cache_bytes=64 << 20) as (server, _):
        engines = engines_below(server.pid)
        assert engines
        server.kill()
        assert gone(engines)
