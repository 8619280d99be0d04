"""The process group of the learner's ranks. The driver imports this module, so torch is imported inside functions."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def join_ranks(rank: int, world_size: int, host: str, port: int, device: torch.device, timeout_s: float) -> None:
    """Form the process group (gloo on CPU, nccl on GPUs), then hand it to DeepSpeed.

    torch creates the group first and without a ``device_id``. DeepSpeed would pass one, and weight-sync groups formed
    later in the same process would then hang. Raises RuntimeError if DeepSpeed does not compute on `device`.
    """
    import deepspeed
    import deepspeed.ops
    import torch.distributed as dist

    _check_accelerator(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed reads these variables. Each rank sees one device, so its local rank is always 0.
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
    # DeepSpeed would compile its shared-memory CPU collectives at the first start, for minutes; gloo suffices.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend)


def _check_accelerator(device: torch.device) -> None:
    """Raise RuntimeError if DeepSpeed, which chooses by what it finds, computes on another device than this rank."""
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise RuntimeError(
            f"DeepSpeed computes on {chosen}, this rank of the learner on {device.type}: learner.gpus_per_rank above 0 "
            "needs a build of torch that sees the node's GPUs, and DS_ACCELERATOR must not be set to another device"
        )


def raise_on_all(error: Exception | None, what: str) -> None:
    """Raise OSError on every rank if any rank passes an `error`; a collective. The message is `what` and all errors.

    A local operation such as a write may fail on one rank only. Raising there at once would leave the other ranks
    waiting in the next collective until the group's timeout.
    """
    import torch.distributed as dist

    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else f"{type(error).__name__}: {error}")
    failures = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None)
    if failures:
        raise OSError(f"{what}: {failures}") from error


def ranks_on_node() -> int:
    """Count the ranks on this rank's node; a collective."""
    import torch.distributed as dist

    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names.count(socket.gethostname())


def leave_ranks() -> None:
    """Destroy the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
