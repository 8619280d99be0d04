"""The learner's memory and time: the output layer against the naive one, whole steps against bare transformers."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learner.trainer.losses import topk_divergence
from learner.trainer.output_layer import ChunkView, LogitTransform, OutputLayer
from tests.benchmarks.e2e_runs import MODEL
from tests.benchmarks.figures import THREADS, Figure, Figures
from tests.support.memory import peak_bytes, reset_peak

VOCABULARY, WIDTH, K = 151_936, 1024, 256
CHUNK_TOKENS = 256
"""`learner.logit_chunk_tokens`, its default on CPU."""
FLOAT_BYTES = 4


def run() -> Figures:
    """All figures; about five minutes on two cores."""
    torch.set_num_threads(THREADS)
    return {
        **loss_peak(),
        **loss_time(),
        **shared_passes(),
        **apart(step_memory, MODEL),
        **apart(forward_backward, MODEL),
    }


def apart(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`function` in a process of its own: peak memory and process groups belong to one measurement."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, torch.set_num_threads, (THREADS,)) as pool:
        return pool.apply(function, args)


# --- the output layer -----------------------------------------------------------------------------------------------


class Head:
    """One micro-batch of random hidden states over a vocabulary of today's size."""

    def __init__(self, tokens: int, width: int) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)
        self.layer = OutputLayer(self.linear, LogitTransform(), CHUNK_TOKENS)
        self.hidden = torch.randn(tokens, width).requires_grad_()
        self.ids = torch.randint(0, VOCABULARY, (tokens, K))
        self.sampled = torch.randint(0, VOCABULARY, (tokens,))
        self.teacher = torch.full((tokens, K), -12.0)
        self.teacher_tail = torch.full((tokens,), -0.01)

    def chunked(self) -> None:
        """As the learner does it."""

        def loss(chunk: ChunkView) -> Tensor:
            return self._divergence(chunk.logprobs, chunk.tail, chunk.rows)

        self.layer(self.hidden, self.ids, self.sampled, loss=loss).backward()

    def naive(self) -> None:
        """All logits at once, log-softmax, gather, autograd; the tail left to `topk_divergence`."""
        logprobs = self.linear(self.hidden).log_softmax(dim=-1).gather(-1, self.ids)
        self._divergence(logprobs, None, slice(None)).backward()

    def _divergence(self, logprobs: Tensor, tail: Tensor | None, rows: slice) -> Tensor:
        return topk_divergence(
            logprobs, self.teacher[rows], form="tail", student_tail=tail, teacher_tail=self.teacher_tail[rows]
        ).sum()

    def timed(self, method: Callable[[], None]) -> float:
        """Seconds of one forward and backward pass."""
        self.hidden.grad = self.linear.weight.grad = None
        started = time.perf_counter()
        method()
        return time.perf_counter() - started


def loss_peak(tokens: int = 8192, width: int = WIDTH) -> Figures:
    """Peak extra memory of loss and gradient over one float32 [tokens, V] tensor, the weight's gradient left out."""
    peak = apart(_extra_bytes, tokens, width)["bytes"]
    weight_gradient = VOCABULARY * width * FLOAT_BYTES
    ratio = (peak - weight_gradient) / (tokens * VOCABULARY * FLOAT_BYTES)
    how = f"V={VOCABULARY}, d={width}, {tokens} tokens, k={K}, chunks of {CHUNK_TOKENS}: resident memory, own process"
    return {
        "learner.loss_peak_ratio": Figure(
            ratio, "ratio", how, at_most=1 / 8, limit=f"{CHUNK_TOKENS / tokens:.3g}: one chunk of logits"
        )
    }


def _extra_bytes(tokens: int, width: int) -> dict[str, int]:
    head = Head(tokens, width)
    before = reset_peak()
    head.chunked()
    return {"bytes": peak_bytes() - before}


def loss_time(tokens: int = 1024, width: int = WIDTH, repeats: int = 3) -> Figures:
    """Time of loss and gradient over that of the naive version, which fits at this length. Medians, interleaved."""
    head = Head(tokens, width)
    pairs = [(head.timed(head.chunked), head.timed(head.naive)) for _ in range(repeats + 1)][1:]
    ratio = statistics.median(ours for ours, _ in pairs) / statistics.median(naive for _, naive in pairs)
    how = f"V={VOCABULARY}, d={width}, {tokens} tokens, k={K}: medians of {repeats}, taken in turns"
    return {"learner.loss_time_ratio": Figure(ratio, "ratio", how, at_most=1.15, limit="1 by FLOPs")}


# --- whole steps ----------------------------------------------------------------------------------------------------

ANSWERS, PROMPT_TOKENS, RESPONSE_TOKENS, BUDGET_TOKENS = 16, 8, 56, 256


def make_engine(model: Path) -> tuple[Any, Any]:
    """(engine, scored answers) of one rank at ZeRO 0."""
    from learner.trainer.distributed import free_port, join_ranks
    from learner.trainer.engine import LearnerEngine
    from tests.support.scored import learner_config, make_scored

    join_ranks(0, 1, "127.0.0.1", free_port(), torch.device("cpu"), 60.0)
    learner = {
        "micro_batch_tokens": BUDGET_TOKENS,
        "logit_chunk_tokens": CHUNK_TOKENS,
        "threads": THREADS,
    }
    scored = make_scored(
        ANSWERS,
        k=K,
        prompt_tokens=(PROMPT_TOKENS, PROMPT_TOKENS + 1),
        response_tokens=(RESPONSE_TOKENS, RESPONSE_TOKENS + 1),
        vocabulary=49_152,
    )
    return LearnerEngine(learner_config(model, learner=learner)), scored


def step_memory(model: Path) -> Figures:
    """Peak resident memory of the whole process in its third step over weights + gradients + Adam's state."""
    engine, scored = make_engine(model)
    peak = 0
    for _ in range(3):
        reset_peak()
        engine.accumulate(scored)
        engine.finish_step(ANSWERS * RESPONSE_TOKENS, ANSWERS)
        peak = peak_bytes()
    state = 4 * FLOAT_BYTES * engine.info().parameters
    how = f"SmolLM2-135M, ZeRO 0, float32, micro-batches of {BUDGET_TOKENS} tokens; all of the process counts"
    return {"learner.peak_rss_ratio": Figure(peak / state, "ratio", how, at_most=1.6, limit="1: the state itself")}


def forward_backward(model: Path, repeats: int = 5) -> Figures:
    """Tokens/s of `accumulate` over those of a bare transformers loop with cross-entropy on the same batches."""
    from transformers import AutoModelForCausalLM

    engine, scored = make_engine(model)
    bare = AutoModelForCausalLM.from_pretrained(model)
    bare.train()
    rows = [[*s.trajectory.prompt.student_ids.tolist(), *s.trajectory.response_ids.tolist()] for s in scored]
    batches = torch.tensor(rows).split(BUDGET_TOKENS // len(rows[0]))

    def ours() -> None:
        engine.accumulate(scored)

    def theirs() -> None:
        for ids in batches:
            bare(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    times = [(seconds(ours), seconds(theirs)) for _ in range(repeats + 1)][1:]
    ratio = statistics.median(t for _, t in times) / statistics.median(o for o, _ in times)
    how = (
        f"SmolLM2-135M, float32, {ANSWERS} answers of {PROMPT_TOKENS}+{RESPONSE_TOKENS} tokens in {len(batches)} "
        f"micro-batches: medians of {repeats}, taken in turns"
    )
    return {"learner.fwd_bwd_ratio": Figure(ratio, "ratio", how, at_least=0.95)}


def shared_passes() -> Figures:
    """Largest share of a pass without gradients (the learner's top k) that one of two ranks computes, under ZeRO-3."""
    from learner.trainer.distributed import free_port
    from tests.support.tiny import make_tiny_model

    with tempfile.TemporaryDirectory(prefix="bench-learner-") as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        alone, *_ = _on_ranks(1, free_port(), model)
        shares = _on_ranks(2, free_port(), model)
    how = f"tiny model, {4 * ANSWERS} answers of 4 to 64 tokens, micro-batches of {BUDGET_TOKENS}, with fillers"
    return {
        "learner.shared_pass_ratio": Figure(max(shares) / alone, "ratio", how, at_most=0.6, limit="0.5: a half each")
    }


def _on_ranks(ranks: int, port: int, model: Path) -> list[int]:
    """Tokens of the forward passes of each of `ranks` ranks."""
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        return pool.starmap(_topk_tokens, [(rank, ranks, port, model) for rank in range(ranks)], chunksize=1)


def _topk_tokens(rank: int, ranks: int, port: int, model: Path) -> int:
    from learner.loop.micro_batcher import MicroBatcher
    from learner.trainer.distributed import join_ranks
    from learner.trainer.engine import LearnerEngine
    from learner.trainer.micro_batch import student_sequence
    from tests.support.scored import learner_config, make_scored

    join_ranks(rank, ranks, "127.0.0.1", port, torch.device("cpu"), 60.0)
    learner = {"micro_batch_tokens": BUDGET_TOKENS, "zero_stage": 3, "ranks": ranks}
    engine = LearnerEngine(learner_config(model, learner=learner))
    tokens = 0

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal tokens
        tokens += inputs[0].numel() if isinstance(module, nn.Embedding) else 0

    nn.modules.module.register_module_forward_pre_hook(count)
    batcher: MicroBatcher[Any] = MicroBatcher(ranks, BUDGET_TOKENS, packed=engine.info().packed)
    sequences = [student_sequence(one) for one in make_scored(4 * ANSWERS, response_tokens=(4, 65))]
    groups = [group for s in sequences for group in batcher.add(len(s.prompt_ids) + len(s.response_ids), s)]
    for group in (*groups, *batcher.flush()):
        engine.inference.topk(group[rank], K)
    return tokens


def seconds(function: Callable[[], None]) -> float:
    """How long `function` takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
