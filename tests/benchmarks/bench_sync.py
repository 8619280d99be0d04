"""Weight sync: a whole model into one vLLM worker against a bare broadcast, and what a delta saves in bfloat16."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from common.config.loader import validate
from common.config.model import Config, SyncConfig
from common.weight_sync.collective import SENDER, Control
from tests.support.weight_groups import HOST, free_port, manifest_of, open_all, sync_once

if TYPE_CHECKING:
    from common.weight_sync.manifest import SyncManifest
    from rollout_workers.engine.engine import RolloutEngine

REPEATS = 5
STEPS = 3
LEARNING_RATE = 1e-6
Wire = Literal["ipc", "gloo"]
WIRES: tuple[Wire, ...] = ("ipc", "gloo")
BANDWIDTH_RATIO, DELTA_RATIO = 0.5, 0.1
TIMEOUT_S = 120.0


def run() -> dict[str, dict[str, Any]]:
    """All figures; about two minutes on two cores."""
    from deploy.tasks.gguf import prepare_smollm2

    with tempfile.TemporaryDirectory(prefix="bench-sync-") as folder:
        model = Path(folder) / "smollm2"
        prepare_smollm2(model)
        return {**asyncio.run(bandwidth(model)), **delta_bytes(model)}


# --- a whole model --------------------------------------------------------------------------------------------------


async def bandwidth(model: Path) -> dict[str, dict[str, Any]]:
    """Bytes/s from the pause of an engine to its going on, over those of a broadcast that does nothing else.

    The target is for the wire one would choose on one host, `ipc`; that of gloo is reported beside it.
    """
    from rollout_workers.engine.engine import RolloutEngine

    config = validate(Config, run_config(model))
    engine = await RolloutEngine.start(str(model), config, max_logprobs=8)
    try:
        weights = load(model, torch.float32)
        plan = manifest_of(weights, config.sync.bucket_bytes)
        by_wire = {wire: await in_turns(engine, config.sync, wire, weights, plan) for wire in WIRES}
    finally:
        engine.close()
    figures = {}
    for wire, (ours, theirs) in by_wire.items():
        how = (
            f"SmolLM2-135M, float32, {plan.nbytes / 1e6:.0f} MB over {wire}, buckets of "
            f"{config.sync.bucket_bytes >> 20} MiB: pause, update, resume {ours:.2f} s, "
            f"{plan.nbytes / ours / 1e9:.2f} GB/s; bare gloo {theirs:.2f} s; medians of {REPEATS}, taken in turns"
        )
        name = "sync.bandwidth_ratio" if wire == "ipc" else f"sync.bandwidth_ratio_{wire}"
        figures[name] = figure(theirs / ours, BANDWIDTH_RATIO if wire == "ipc" else None, how, at_most=False)
    return figures


async def in_turns(
    engine: RolloutEngine, sync: SyncConfig, wire: Wire, weights: dict[str, Tensor], plan: SyncManifest
) -> tuple[float, float]:
    """Seconds of a sync over `wire`, and of the bare broadcast of as many bytes after each; medians."""
    from learner.publishing.sender import open_sender

    engine._sync = sync = sync.model_copy(update={"backend": wire})
    port = free_port()
    sender, _ = await asyncio.gather(
        asyncio.to_thread(open_sender, sync, HOST, port, 2), engine.join_sync(HOST, port, 1, 2)
    )
    times = []
    with BareBroadcast(plan.nbytes) as bare:
        for version in range(REPEATS + 1):
            started = time.perf_counter()
            sent = asyncio.to_thread(sender.send, weights.items(), plan)
            await asyncio.gather(sent, engine.receive(plan, version))
            times.append((time.perf_counter() - started, bare.seconds()))
    sender.close()
    ours, theirs = (statistics.median(side) for side in zip(*times[1:], strict=True))
    return ours, theirs


def run_config(model: Path) -> dict[str, Any]:
    return {
        "run": {"name": "bench"},
        "student": {"model": str(model), "max_sequence_tokens": 256},
        "context": {"text": "unused"},
        "data": {"train": "unused"},
        "rollout": {"max_num_seqs": 16, "threads": torch.get_num_threads()},
        "sync": {"timeout_s": TIMEOUT_S},
    }


class BareBroadcast:
    """One tensor to one other process over gloo, again and again into the same memory."""

    def __init__(self, nbytes: int) -> None:
        self._data = torch.ones(nbytes, dtype=torch.uint8)

    def __enter__(self) -> BareBroadcast:
        port = free_port()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_receive_bare, args=(port, self._data.numel()), daemon=True)
        self._process.start()
        self._control = Control(HOST, port, SENDER, 2, TIMEOUT_S)
        return self

    def seconds(self) -> float:
        """From the first byte to the receiver's word that it has the last."""
        self._control.allreduce_min(1, "start")
        started = time.perf_counter()
        self._control.broadcast(self._data, "bare")
        self._control.allreduce_min(1, "end")
        return time.perf_counter() - started

    def __exit__(self, *_: object) -> None:
        self._control.allreduce_min(0, "stop")
        self._process.join()
        self._control.close()


def _receive_bare(port: int, nbytes: int) -> None:
    control = Control(HOST, port, 1, 2, TIMEOUT_S)
    data = torch.zeros(nbytes, dtype=torch.uint8)
    while control.allreduce_min(1, "start"):
        control.broadcast(data, "bare")
        control.allreduce_min(1, "end")


# --- deltas ---------------------------------------------------------------------------------------------------------


def delta_bytes(model: Path) -> dict[str, dict[str, Any]]:
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
        f"SmolLM2-135M, float32 master, bfloat16 on the wire, AdamW, lr {LEARNING_RATE:g}, one sequence of "
        f"{tokens.shape[1]} tokens: the largest of {STEPS} steps ({', '.join(f'{ratio:.3f}' for ratio in ratios)}); a "
        f"delta sync took {statistics.median(r.seconds for r in reports[1:]):.2f} s, the whole one "
        f"{reports[0].seconds:.2f} s"
    )
    return {"sync.delta_bytes_ratio": figure(max(ratios), DELTA_RATIO, how, at_most=True)}


def load(model: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters by name, as the learner publishes them."""
    from transformers import AutoModelForCausalLM

    from learner.trainer.export import WeightView

    return dict(WeightView(AutoModelForCausalLM.from_pretrained(model, dtype=dtype)).gathered(0))


def rounded(master: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The master's parameters as they go on the wire."""
    for name, parameter in master.named_parameters():
        yield name, parameter.detach().bfloat16()


def figure(value: float, limit: float | None, how: str, *, at_most: bool) -> dict[str, Any]:
    """One measurement, as ``python -m tests.benchmarks`` wants it; without a limit it is reported only."""
    met = None if limit is None else value <= limit if at_most else value >= limit
    return {
        "value": value,
        "unit": "ratio",
        "target": None if limit is None else f"{'at most' if at_most else 'at least'} {limit:g}",
        "ok": met,
        "how": f"{how}; {torch.get_num_threads()} threads",
    }
