"""The process group of the learner's ranks. The driver imports this, so torch comes only where a rank runs."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def join_ranks(rank: int, world_size: int, host: str, port: int, device: torch.device, timeout_s: float) -> None:
    """Form the ranks' group, gloo on CPU and nccl on GPUs, then hand it to DeepSpeed.

    torch's group comes first and without a ``device_id``: DeepSpeed would pass one, and weight-sync groups formed
    later in the same process then hang.
    """
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    # One device is visible to each rank, so the local rank is 0 whatever the rank. DeepSpeed reads these.
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    dist.init_process_group(
        backend,
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    # DeepSpeed's own shared-memory collectives for CPUs would be compiled at the first start, for minutes; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend)


def raise_on_all(error: Exception | None, what: str) -> None:
    """A collective: where one rank or more have an `error`, every rank raises OSError, which says whose, after `what`.

    What a rank does by itself, such as writing, may fail on it alone; raised there and then it would leave the others
    in the next collective until the group's time is over.
    """
    import torch.distributed as dist

    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}")
    said = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None)
    if said:
        raise OSError(f"{what}: {said}") from error


def leave_ranks() -> None:
    """Take the group down; harmless where there is none."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
