"""Weight sync: time of a whole model into one vLLM worker, and bytes that a delta saves in bfloat16."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.loader import validate
from common.config.model import Config, SyncConfig
from tests.benchmarks.e2e_runs import MODEL
from tests.benchmarks.figures import THREADS, Figure, Figures
from tests.support.processes import free_port
from tests.support.weight_groups import HOST, manifest_of, open_all, sync_once

REPEATS = 5
STEPS = 3
LEARNING_RATE = 1e-6
TIMEOUT_S = 120.0


def run() -> Figures:
    """All figures; about two minutes on two cores."""
    torch.set_num_threads(THREADS)
    return {**asyncio.run(sync_seconds(MODEL)), **delta_bytes(MODEL)}


# --- a whole model --------------------------------------------------------------------------------------------------


async def sync_seconds(model: Path) -> Figures:
    """Seconds of a sync, from an engine's pause to its resume. No target."""
    from learner.publishing.sender import open_sender
    from rollout_workers.engine.engine import RolloutEngine

    config = validate(Config, run_config(model))
    engine = await RolloutEngine.start(str(model), config, max_logprobs=8)
    times = []
    try:
        weights = load(model, torch.float32)
        plan = manifest_of(weights, config.sync.bucket_bytes)
        port = free_port()
        sender, _ = await asyncio.gather(
            asyncio.to_thread(open_sender, config.sync, HOST, port, 2), engine.join_sync(HOST, port, 1, 2)
        )
        for version in range(REPEATS + 1):
            started = time.perf_counter()
            sent = asyncio.to_thread(sender.send, weights.items(), plan)
            await asyncio.gather(sent, engine.receive(plan, version))
            times.append(time.perf_counter() - started)
        sender.close()
    finally:
        engine.close()
    seconds = statistics.median(times[1:])
    how = (
        f"SmolLM2-135M, {plan.nbytes / 1e6:.0f} MB of float32 over gloo, pause to resume: "
        f"{plan.nbytes / seconds / 1e9:.2f} GB/s; median of {REPEATS}"
    )
    return {"sync.seconds": Figure(seconds, "s", how)}


def run_config(model: Path) -> dict[str, Any]:
    return {
        "run": {"name": "bench"},
        "student": {"model": str(model), "max_sequence_tokens": 256},
        "context": {"text": "unused"},
        "data": {"train": "unused"},
        "rollout": {"max_num_seqs": 16, "threads": THREADS},
        "sync": {"timeout_s": TIMEOUT_S},
    }


# --- deltas ---------------------------------------------------------------------------------------------------------


def delta_bytes(model: Path) -> Figures:
    """Bytes on the wire over those of all weights, in bfloat16, for AdamW steps on a float32 master copy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    master = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()
    text = "On-policy distillation trains a student on its own answers, scored by a teacher that knows more. " * 2
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(master.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    plan = manifest_of(dict(rounded(master)), SyncConfig().bucket_bytes)
    sender, receivers = open_all(SyncConfig(delta=True, timeout_s=TIMEOUT_S), 1)
    reports = []
    for _ in range(1 + STEPS):
        report, received = sync_once(sender, receivers, plan, rounded(master))
        assert all(received[name].equal(tensor) for name, tensor in rounded(master))
        reports.append(report)
        optimizer.zero_grad()
        master(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(master.parameters(), 1.0)
        optimizer.step()
    sender.close()
    ratios = [report.bytes / report.weight_bytes for report in reports[1:]]
    how = (
        f"{model.name}, float32 master, bfloat16 on the wire, AdamW, lr {LEARNING_RATE:g}, one sequence of "
        f"{tokens.shape[1]} tokens: the largest of {STEPS} steps ({', '.join(f'{ratio:.3f}' for ratio in ratios)}); a "
        f"delta sync took {statistics.median(r.seconds for r in reports[1:]):.2f} s, the whole one "
        f"{reports[0].seconds:.2f} s"
    )
    return {"sync.delta_bytes_ratio": Figure(max(ratios), "ratio", how, at_most=0.1)}


def load(model: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters by name, as the learner publishes them."""
    from transformers import AutoModelForCausalLM

    from learner.trainer.export import WeightView

    return dict(WeightView(AutoModelForCausalLM.from_pretrained(model, dtype=dtype)).gathered(0))


def rounded(master: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The master's parameters as they go on the wire."""
    for name, parameter in master.named_parameters():
        yield name, parameter.detach().bfloat16()
