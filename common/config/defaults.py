"""Defaults that depend on the GPUs that a process reserves. Pure functions of the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from common.config.inputs import TeacherConfig
from common.config.training import LearnerConfig, RolloutConfig, SyncConfig

GPU_CHUNK_TOKENS, CPU_CHUNK_TOKENS = 1024, 256


def logit_chunk_tokens(learner: LearnerConfig) -> int:
    """Response positions whose logits a rank holds at once."""
    return learner.logit_chunk_tokens or (GPU_CHUNK_TOKENS if learner.gpus_per_rank else CPU_CHUNK_TOKENS)


def enforce_eager(rollout: RolloutConfig, *, deterministic: bool) -> bool:
    """True if engines run without CUDA graphs."""
    if rollout.enforce_eager is not None:
        return rollout.enforce_eager
    return deterministic or not rollout.gpus_per_worker


def sync_backend(
    sync: SyncConfig, learner: LearnerConfig, rollout: RolloutConfig, teachers: Iterable[TeacherConfig]
) -> Literal["gloo", "nccl", "ipc", "file"]:
    """Transport of the weight group: nccl if each member has whole GPUs, since nccl refuses two members on one GPU."""
    if sync.backend != "auto":
        return sync.backend
    members = member_gpus(learner, rollout, teachers).values()
    return "nccl" if min(members) >= 1 and not sync.delta else "gloo"


def member_gpus(learner: LearnerConfig, rollout: RolloutConfig, teachers: Iterable[TeacherConfig]) -> dict[str, float]:
    """GPUs of the weight group's members, by the key that sets them."""
    receiving = [one.gpus for one in teachers if one.kind in ("live", "ema")]
    return {
        "learner.gpus_per_rank": learner.gpus_per_rank,
        "rollout.gpus_per_worker": rollout.gpus_per_worker,
        **({"teacher.gpus": min(receiving)} if receiving else {}),
    }
