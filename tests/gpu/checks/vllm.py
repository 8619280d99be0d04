"""Checks that need vLLM: engines, eager, with CUDA graphs and on two GPUs, and vLLM as the teacher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from common.config.model import Config, SyncConfig, TeacherConfig
from common.protocol.schema import Sampling, ScoreMode, TokenSequence
from learner.loop.mismatch import mismatch_bounds
from teacher_server.backends.base import Backend, Work
from tests.gpu.checks.teacher import context_ids, score_items, scores_of
from tests.gpu.models import joined, load, model_folder, plain_logprobs, random_sequences, rms
from tests.gpu.place import Place
from tests.gpu.report import Figure
from tests.support.scored import learner_config
from tests.support.vllm_server import vllm_server


def engine_config(place: Place, **rollout: Any) -> Config:
    """Configuration of an engine that leaves room for the checking process."""
    folder = model_folder(place, place.sizes.scored)
    section = {"gpu_memory_utilization": 0.5, "max_num_seqs": place.sizes.samples, **rollout}
    longest = 2 * (place.sizes.prompt_tokens + place.sizes.response_tokens)
    student = {"dtype": "bfloat16", "max_sequence_tokens": longest}
    return learner_config(folder, student=student, rollout=section)


async def answers(place: Place, config: Config) -> dict[str, Any]:
    """Start an engine, sample, score its own tokens as a probe does; seconds, sequences and log-probs."""
    from rollout_workers.engine.engine import RolloutEngine

    began = time.monotonic()
    engine = await RolloutEngine.start(config.student.model, config, max_logprobs=place.sizes.k)
    try:
        found: dict[str, Any] = {"start_s": time.monotonic() - began}
        prompts = [s.prompt_ids for s in random_sequences(place, place.sizes.samples, place.sizes.scored.vocabulary)]

        async def sample() -> list[Any]:
            jobs = []
            for i, prompt in enumerate(prompts):
                sampling = Sampling(
                    max_tokens=place.sizes.response_tokens, temperature=1.0, seed=i, top_logprobs=place.sizes.k
                )
                jobs.append(engine.generate(prompt, sampling, f"{time.monotonic()}-{i}"))
            return list(await asyncio.gather(*jobs))

        await sample()
        began = time.monotonic()
        generations = await sample()
        found["tokens_s"] = sum(len(one.response_ids) for one in generations) / (time.monotonic() - began)
        sequences = [TokenSequence(p, one.response_ids) for p, one in zip(prompts, generations, strict=True)]
        found["sequences"] = [s for s in sequences if len(s.response_ids)]
        found["sampled"] = joined([one.sampled_logprobs for one in generations])
        found["probe"] = joined(await engine.logprobs(found["sequences"]))
        return found
    finally:
        engine.close()


def exact(place: Place, sequences: list[TokenSequence], dtype: torch.dtype) -> torch.Tensor:
    """Log-probs of the responses by transformers, with a float32 output layer."""
    import numpy as np

    model = load(model_folder(place, place.sizes.scored), place, dtype)
    whole = [np.concatenate([s.prompt_ids, s.response_ids]) for s in sequences]
    return joined([plain_logprobs(model, ids, len(s.response_ids)) for ids, s in zip(whole, sequences, strict=True)])


def agreement(place: Place, found: dict[str, Any], name: str) -> Iterator[Figure]:
    """Log-probs while sampling, and of the probe, against transformers in bfloat16."""
    expected = exact(place, found["sequences"], torch.bfloat16)
    stop = mismatch_bounds(SyncConfig(), dtype="bfloat16", max_staleness=0).stop_nats
    yield Figure(f"{name}: start", found["start_s"], "s")
    yield Figure("speed", found["tokens_s"], "tokens/s")
    yield Figure("sampled sd", rms(found["sampled"] - expected), "nats", at_most=stop)
    yield Figure("probe sd", rms(found["probe"] - expected), "nats", at_most=stop)
    yield Figure("probe p99", (found["probe"] - expected).abs().quantile(0.99).item(), "nats")


def engine(place: Place) -> Iterator[Figure]:
    """An eager engine."""
    yield from agreement(place, asyncio.run(answers(place, engine_config(place, enforce_eager=True))), "eager")


def graphs(place: Place) -> Iterator[Figure]:
    """An engine with CUDA graphs."""
    yield from agreement(place, asyncio.run(answers(place, engine_config(place, enforce_eager=False))), "graphs")


def tp2(place: Place) -> Iterator[Figure]:
    """An engine on two GPUs."""
    yield from agreement(place, asyncio.run(answers(place, engine_config(place, tensor_parallel_size=2))), "two GPUs")


def scored(place: Place, backend: Backend, mode: ScoreMode, temperature: float) -> tuple[torch.Tensor, float]:
    """Log-probs of random items under a context, scored twice, and the seconds of the second time."""
    (prefix,) = backend.prefill([context_ids(place)], None)
    works = [Work(item, prefix, mode, temperature, 0) for item in score_items(place, None)]
    if mode == "sampled":
        works = [replace(work, item=replace(work.item, topk_ids=None)) for work in works]
    backend.score(works)
    began = time.monotonic()
    results = backend.score(works)
    return joined([scores_of([result])[0] for result in results]), time.monotonic() - began


def against_transformers(place: Place, backend: Backend, temperature: float) -> Iterator[Figure]:
    """A teacher's scores at given ids, if it has any, and its time, against the transformers backend in bfloat16."""
    from teacher_server.backends.hf.backend import TransformersBackend

    mode: ScoreMode = "at_ids" if "at_ids" in backend.modes else "sampled"
    got, seconds = scored(place, backend, mode, temperature)
    model = load(model_folder(place, place.sizes.scored), place, torch.bfloat16)
    expected, plain_seconds = scored(place, TransformersBackend(model, model_name="bf16"), mode, temperature)
    yield Figure("fixed ids", float(mode == "at_ids"), at_least=1.0 if place.on_gpu else None)
    stop = mismatch_bounds(SyncConfig(), dtype="bfloat16", max_staleness=0).stop_nats
    yield Figure("sd against transformers", rms(got - expected), "nats", at_most=stop)
    yield Figure("time", seconds / plain_seconds, "of transformers'")


def v2(place: Place) -> Iterator[Figure]:
    """vLLM as the teacher's backend under a context."""
    from teacher_server.backends.vllm.backend import VllmBackend

    folder = model_folder(place, place.sizes.scored)
    config = TeacherConfig(model=str(folder), backend="vllm", dtype="bfloat16", gpu_memory_utilization=0.5)
    started = time.monotonic()
    vllm = VllmBackend.load(str(folder), config)
    yield Figure("start", time.monotonic() - started, "s")
    try:
        yield from against_transformers(place, vllm, 0.7)
    finally:
        vllm.close()


def remote(place: Place) -> Iterator[Figure]:
    """A ``vllm serve`` as the teacher's endpoint under a context."""
    from common.data.model_lookup import load_tokenizer
    from teacher_server.backends.remote.backend import RemoteBackend

    folder, k = model_folder(place, place.sizes.scored), place.sizes.k
    memory = ["--gpu-memory-utilization", "0.5"] if place.on_gpu else ["--kv-cache-memory-bytes", str(1 << 28)]
    arguments = ["--dtype", "bfloat16", "--enable-scale-out", "--max-logprobs", str(k + 1), *memory]
    started = time.monotonic()
    with vllm_server(folder, place.folder / "endpoint.log", *arguments) as url:
        config = TeacherConfig(model=str(folder), backend="remote", endpoint=url, dtype="bfloat16", max_k=k)
        backend = RemoteBackend.load(config, load_tokenizer(str(folder)))
        yield Figure("start", time.monotonic() - started, "s")
        try:
            yield from against_transformers(place, backend, 1.0)
        finally:
            backend.close()
