"""What the GPUs that a run's processes reserve imply: defaults of other keys, sharing of one GPU. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from common.config.inputs import TeacherConfig
from common.config.training import LearnerConfig, RolloutConfig, SyncConfig

GPU_CHUNK_TOKENS, CPU_CHUNK_TOKENS = 1024, 256
MEMORY_UTILIZATION = 0.9


def logit_chunk_tokens(learner: LearnerConfig) -> int:
    """Response positions whose logits a rank holds at once."""
    return learner.logit_chunk_tokens or (GPU_CHUNK_TOKENS if learner.gpus_per_rank else CPU_CHUNK_TOKENS)


def enforce_eager(rollout: RolloutConfig, *, deterministic: bool) -> bool:
    """True if engines run without CUDA graphs."""
    if rollout.enforce_eager is not None:
        return rollout.enforce_eager
    return deterministic or not rollout.gpus_per_worker


def memory_utilization(configured: float | None, gpus: float) -> float:
    """Share of one GPU's memory that an engine may take whose process reserves `gpus`."""
    if configured is not None:
        return configured
    return MEMORY_UTILIZATION * (gpus if is_part(gpus) else 1.0)


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


def is_part(gpus: float) -> bool:
    """True for a process that shares its GPU."""
    return 0 < gpus < 1


def reserved_gpus(
    learner: LearnerConfig, rollout: RolloutConfig, teachers: Mapping[str, TeacherConfig]
) -> dict[str, float]:
    """GPUs that each actor of a run reserves, by names as ``teacher default``, ``rank 0``, ``worker 0``."""
    per_worker = rollout.gpus_per_worker * rollout.tensor_parallel_size
    return {
        **{f"teacher {name}": one.gpus for name, one in teachers.items() if one.url is None and one.kind != "base"},
        **{f"rank {rank}": learner.gpus_per_rank for rank in range(learner.ranks)},
        **{f"worker {slot}": per_worker for slot in range(rollout.workers)},
    }


def parts_of_one_gpu(reserved: Mapping[str, float]) -> dict[str, float]:
    """The actors that reserve a part of a GPU, if one GPU holds them all; otherwise none."""
    parts = {name: gpus for name, gpus in reserved.items() if is_part(gpus)}
    return parts if round(sum(parts.values()), 4) <= 1 else {}
