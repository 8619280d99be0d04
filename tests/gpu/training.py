"""Training in the checks: scored answers, learner engines in a world of one rank, a plain loop to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from common.config.model import Config
from common.protocol.schema import ItemScore, Prompt, ScoredTrajectory, Trajectory, as_ids
from learner.trainer.losses import topk_divergence
from tests.gpu.compat import adapt_torch
from tests.gpu.models import load, random_sequences
from tests.gpu.place import Place
from tests.support.scored import learner_config

LEARNING_RATE = 3e-4
"""Moves weights by more than bfloat16's rounding in a step, so that the loss drops in bfloat16 as in float32."""


def scored_batch(place: Place) -> list[ScoredTrajectory]:
    """Random sequences; at every position a random teacher over k consecutive ids and the tail."""
    rng, sizes = np.random.default_rng(3), place.sizes
    vocabulary, k = sizes.trained.vocabulary, sizes.k
    batch = []
    for index, sequence in enumerate(random_sequences(place, sizes.samples, vocabulary)):
        tokens = len(sequence.response_ids)
        logits = rng.normal(0, 2, (tokens, k + 1))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        support = (rng.integers(0, vocabulary, (tokens, 1)) + np.arange(k)) % vocabulary
        ids = as_ids(sequence.prompt_ids)
        prompt = Prompt(row_id=str(index), student_ids=ids, teacher_ids=ids, context=None)
        sampled = logprobs[:, -1].astype(np.float32)
        trajectory = Trajectory(
            f"{index:04d}", 0, prompt, sequence.response_ids, sampled, as_ids(support), "length", ((0, 0),)
        )
        score = ItemScore(logprobs[:, :k].astype(np.float16), sampled, sampled)
        batch.append(ScoredTrajectory(trajectory, score, "teacher", 0))
    return batch


def training_config(place: Place, model: Path, dtype: str, **learner: Any) -> Config:
    """Configuration of one rank on the place's device."""
    sizes = place.sizes
    section = {
        "lr": LEARNING_RATE,
        "gpus_per_rank": int(place.on_gpu),
        "micro_batch_tokens": sizes.micro_batch_tokens,
        "logit_chunk_tokens": sizes.chunk_tokens,
        "threads": None,
        **learner,
    }
    return learner_config(model, student={"dtype": dtype}, learner=section)


def new_engine(config: Config) -> Any:
    """Start a learner engine; the first one forms this process's group of one rank."""
    from learner.trainer.distributed import free_port, join_ranks
    from learner.trainer.engine import LearnerEngine
    from learner.trainer.policy import device_of

    adapt_torch()
    if not dist.is_initialized():
        join_ranks(0, 1, "127.0.0.1", free_port(), device_of(config.learner), 120.0)
    return LearnerEngine(config)


def train(engine: Any, batch: Sequence[ScoredTrajectory], steps: int) -> list[tuple[float, float]]:
    """Take `steps` steps on the same batch; (loss, gradient norm) of each."""
    curve = []
    for _ in range(steps):
        engine.accumulate(batch)
        report = engine.finish_step(sum(len(item.trajectory.response_ids) for item in batch), len(batch))
        curve.append((report.metrics["loss"], report.metrics["grad_norm"]))
    return curve


def plain_training(
    place: Place, config: Config, batch: Sequence[ScoredTrajectory], steps: int
) -> list[tuple[float, float]]:
    """`train` in float32 with transformers and autograd alone: sequence by sequence, whole logits, torch's AdamW."""
    model = load(Path(config.student.model), place, torch.float32)
    learner = config.learner
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learner.lr, betas=learner.betas, eps=learner.eps, weight_decay=learner.weight_decay
    )
    count = sum(len(item.trajectory.response_ids) for item in batch)
    curve = []
    for _ in range(steps):
        total = 0.0
        for item in batch:
            prompt, response = item.trajectory.prompt.student_ids, item.trajectory.response_ids
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]], device=place.device)
            logprobs = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            support = torch.from_numpy(item.trajectory.topk_ids.astype("int64")).to(place.device)
            teacher = torch.from_numpy(item.score.logprobs.astype("float32")).to(place.device)
            loss = topk_divergence(
                logprobs.gather(-1, support),
                teacher,
                form="tail",
                direction="reverse",
                student_tail=logprobs.scatter(-1, support, -torch.inf).logsumexp(-1),
                teacher_tail=torch.from_numpy(item.score.tail_logprob).to(place.device),
            ).sum()
            (loss / count).backward()
            total += loss.item() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), learner.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append((total, norm))
    return curve
