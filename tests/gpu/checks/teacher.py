"""The transformers backend over a long context, and the HTTP server around it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from common.config.model import TeacherConfig
from common.protocol.schema import Context, Ids, ItemScore, ScoreItem, as_ids, context_hash
from teacher_server.backends.base import Work
from teacher_server.backends.hf.backend import TransformersBackend
from tests.gpu.models import joined, load, model_folder, plain_logprobs, random_sequences, rms
from tests.gpu.place import SLACK_BYTES, Place, gib
from tests.gpu.report import Figure

FLOAT32_NATS = 1e-3
"""Allowed difference of float32 scores from a plain float32 pass. 16K summands leave 1e-5; a wrong position is nats."""
TIMES_NOISE = 1.5
"""Allowed rms error of bfloat16 scores in units of that of a plain bfloat16 forward pass."""
ALLOCATOR = 1.02
"""Allowed ratio of allocated bytes to the formula: torch rounds blocks up."""


def context_ids(place: Place) -> Ids:
    """Random ids of the context."""
    shape = place.sizes.scored
    return as_ids(np.random.default_rng(0).integers(0, shape.vocabulary, place.sizes.context_tokens))


def score_items(place: Place, context: str | None) -> list[ScoreItem]:
    """Random sequences with a support of k ids a position."""
    rng, vocabulary, k = np.random.default_rng(2), place.sizes.scored.vocabulary, place.sizes.k
    items = []
    for sequence in random_sequences(place, place.sizes.samples, vocabulary):
        first = rng.integers(0, vocabulary, len(sequence.response_ids))
        support = (first[:, None] + np.arange(k)[None, :]) % vocabulary
        items.append(ScoreItem(context, sequence.prompt_ids, sequence.response_ids, as_ids(support)))
    return items


def teacher(place: Place) -> Iterator[Figure]:
    """Bytes of the context against the formula, speed, and both dtypes against plain forward passes in float32."""
    shape, sizes = place.sizes.scored, place.sizes
    folder = model_folder(place, shape)
    ids, items = context_ids(place), score_items(place, None)
    few = items[: sizes.oracle_samples]

    def sampled(backend: TransformersBackend) -> torch.Tensor:
        (prefix,) = backend.prefill([ids], None)
        return joined([scores_of(backend.score([Work(item, prefix, "at_ids", 1.0, 0)]))[0] for item in few])

    model = load(folder, place, torch.float32)
    expected = joined([plain_logprobs(model, whole(ids, item), item.response_ids.size) for item in few])
    exact = TransformersBackend(model, model_name="float32", prefill_tokens=sizes.prefill_tokens)
    difference = (sampled(exact) - expected).abs().max().item()
    yield Figure("float32 error", difference, "nats", at_most=FLOAT32_NATS)
    del exact, model

    model = load(folder, place, torch.bfloat16)
    noise = joined([plain_logprobs(model, whole(ids, item), item.response_ids.size) for item in few]) - expected
    backend = TransformersBackend(model, model_name="bfloat16", prefill_tokens=sizes.prefill_tokens)
    yield Figure("bf16 rms error", rms(sampled(backend) - expected), "nats", at_most=TIMES_NOISE * rms(noise))

    formula = 2 * (2 * shape.layers * shape.kv_heads * shape.head_dim * ids.size + shape.hidden)
    before = place.allocated()
    (prefix,) = backend.prefill([ids], None)
    after = place.allocated()
    yield Figure("context bytes", prefix.nbytes / formula, "of the formula", at_least=1.0, at_most=1.0)
    yield gib("context in memory", after - before, formula * ALLOCATOR + SLACK_BYTES)

    works = [Work(item, prefix, "at_ids", 1.0, 0) for item in items]
    tokens = sum(item.prompt_ids.size + item.response_ids.size for item in items)
    stayed = scores_of(backend.score(works[:1]))
    prefix.to_host()
    yield Figure("context restored", place.seconds_once(prefix.to_device), "s")
    moved = scores_of(backend.score(works[:1]))
    different = sum(not np.array_equal(*pair) for pair in zip(stayed, moved, strict=True))
    yield Figure("arrays that differ after a stay on the host", different, at_most=0)
    yield gib("peak of a batch", place.peak_of(lambda: backend.score(works)))
    yield Figure("scored", tokens / place.seconds(lambda: backend.score(works), 3), "tokens/s")
    yield Figure("context", ids.size / place.seconds(lambda: backend.prefill([ids], None)), "tokens/s")


def http(place: Place) -> Iterator[Figure]:
    """Scores through server and client equal those of the backend to the bit, one item a request; then its speed."""
    from teacher_server.client import TeacherClient
    from teacher_server.http.auth import Authenticator
    from teacher_server.http.serve import build_service, start_in_thread

    folder = model_folder(place, place.sizes.scored)
    config = TeacherConfig(
        model=str(folder),
        dtype="bfloat16",
        device_map=str(place.device),
        batch_tokens=place.sizes.prefill_tokens,
        context_cache_bytes=64 << 30,
        batch_window_ms=0,
        allow_anonymous=True,
    )
    ids = context_ids(place)
    direct = TransformersBackend(
        load(folder, place, torch.bfloat16), model_name="direct", prefill_tokens=config.batch_tokens
    )
    (prefix,) = direct.prefill([ids], None)
    service = build_service(config)
    server = start_in_thread(service, config, Authenticator())
    name = context_hash(service.info().tokenizer_fingerprint, ids)
    items = score_items(place, name)
    works = [Work(item, prefix, "at_ids", 1.0, 0) for item in items]
    expected = [scores_of(direct.score([work])) for work in works]

    async def ask() -> tuple[list[list[np.ndarray]], float]:
        client = TeacherClient(server.url, "gpu-check", timeout_s=120)
        try:
            await client.put_context(Context(name, ids, None))
            one = [scores_of((await client.score([item], "at_ids", 1.0, 0)).results) for item in items]
            loop = asyncio.get_running_loop()
            started = loop.time()
            await asyncio.gather(*(client.score([item], "at_ids", 1.0, 0) for item in items))
            return one, loop.time() - started
        finally:
            await client.close()

    try:
        served, seconds = asyncio.run(ask())
    finally:
        server.stop()
    different = sum(
        not np.array_equal(got, want)
        for got_item, want_item in zip(served, expected, strict=True)
        for got, want in zip(got_item, want_item, strict=True)
    )
    yield Figure("arrays that differ from the backend's", different, at_most=0)
    tokens = sum(item.prompt_ids.size + item.response_ids.size for item in items)
    yield Figure("served", tokens / seconds, "tokens/s")


def whole(context: Ids, item: ScoreItem) -> Ids:
    """Context, prompt and response as one sequence."""
    return as_ids(np.concatenate([context, item.prompt_ids, item.response_ids]))


def scores_of(results: Sequence[object]) -> list[np.ndarray]:
    """Arrays of one result: sampled log-probs first. Raises RuntimeError for an error of the item."""
    (result,) = results
    if not isinstance(result, ItemScore):
        raise RuntimeError(f"the teacher returned {result}")
    return [result.sampled_logprob, result.logprobs, result.tail_logprob]
