"""Scored trajectories made from a seed, on which the learner's tests train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.config.loader import validate
from common.config.model import Config
from common.protocol.schema import ItemScore, Prompt, ScoredTrajectory, Trajectory, as_ids

VOCABULARY = 512


def make_scored(
    count: int,
    *,
    seed: int = 0,
    k: int = 16,
    prompt_tokens: tuple[int, int] = (3, 12),
    response_tokens: tuple[int, int] = (2, 20),
    vocabulary: int = VOCABULARY,
) -> list[ScoredTrajectory]:
    """Answers of random ids, with a teacher that is a random distribution per position.

    The support is the teacher's own top half and random others, so that both sides have mass in it and outside.
    """
    rng = np.random.default_rng(seed)
    return [
        _one(
            rng,
            f"{seed}/{index}",
            k,
            int(rng.integers(*prompt_tokens)),
            int(rng.integers(*response_tokens)),
            vocabulary,
        )
        for index in range(count)
    ]


def _one(
    rng: np.random.Generator, sample_id: str, k: int, prompt: int, response: int, vocabulary: int
) -> ScoredTrajectory:
    prompt_ids, response_ids = (as_ids(rng.integers(0, vocabulary, size)) for size in (prompt, response))
    logits = rng.normal(0, 2, (response, vocabulary))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1)
    ids = np.stack(
        [rng.permutation(np.concatenate([row[: k // 2], rng.choice(row[k // 2 :], k - k // 2, False)])) for row in best]
    )
    at_ids = np.take_along_axis(logprobs, ids, -1)
    sampled = np.take_along_axis(logprobs, response_ids.astype(np.int64)[:, None], -1)[:, 0]
    outside = logprobs.copy()
    np.put_along_axis(outside, ids, -np.inf, -1)
    return ScoredTrajectory(
        trajectory=Trajectory(
            sample_id=sample_id,
            step=0,
            prompt=Prompt(row_id=sample_id, student_ids=prompt_ids, teacher_ids=prompt_ids, context=None),
            response_ids=response_ids,
            sampled_logprobs=rng.normal(-3, 1, response).astype(np.float32),
            topk_ids=as_ids(ids),
            finish_reason="length",
            versions=((0, 0),),
        ),
        score=ItemScore(
            logprobs=at_ids.astype(np.float16),
            sampled_logprob=sampled.astype(np.float32),
            tail_logprob=np.log(np.exp(outside).sum(-1)).astype(np.float32),
        ),
        model_fingerprint="teacher",
        teacher_version=0,
    )


def learner_config(model: Path, **sections: dict[str, Any]) -> Config:
    """A configuration around `model`; `sections` override keys, for example ``learner={"zero_stage": 2}``."""
    tree: dict[str, Any] = {
        "run": {"name": "test"},
        "student": {"model": str(model)},
        "context": {"text": "unused"},
        "data": {"train": "unused.jsonl"},
        "learner": {"lr": 1e-3, "micro_batch_tokens": 128, "logit_chunk_tokens": 16, "threads": 1},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return validate(Config, tree)
