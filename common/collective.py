"""The weight group: learner rank 0 sends, every engine worker receives. Apart from any default process group."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import xxhash

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroupGloo

SENDER = 0
DIGEST_BYTES = 8


class SyncError(RuntimeError):
    """A weight sync that cannot be trusted: the run must stop."""


def gloo_group(host: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Meet the other ranks at ``host:port``, where the sender listens; raises SyncError when not all come in time."""
    import torch.distributed as dist

    ends: Any = dist  # re-exported without being declared

    timeout = timedelta(seconds=timeout_s)
    try:
        store = ends.TCPStore(host, port, world_size, is_master=rank == SENDER, timeout=timeout)
        return dist.ProcessGroupGloo(ends.PrefixStore("opcd-weights", store), rank, world_size, timeout)
    except RuntimeError as error:
        raise SyncError(
            f"rank {rank} of {world_size} could not join the weight group at {host}:{port} within {timeout_s:.0f} s: "
            f"{error}; raise sync.timeout_s if engines are slow to start"
        ) from error


def broadcast(group: ProcessGroupGloo, tensor: Tensor, what: str) -> None:
    """One blocking broadcast from the sender; `what` names it in the SyncError of a lost peer or a time-out."""
    try:
        cast(Any, group).broadcast(tensor, SENDER).wait()
    except RuntimeError as error:
        raise SyncError(f"weight sync broke at {what}: {error}") from error


def wire_digest(data: Tensor) -> Tensor:
    """xxh3 of a byte tensor, as 8 bytes: sent behind the data, recomputed by the receiver."""
    import torch

    digest = xxhash.xxh3_64_digest(cast(Any, data.numpy()))
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def manifest_digest(hexdigest: str) -> Tensor:
    """A manifest's digest as the 32 bytes that open a sync."""
    import torch

    return torch.frombuffer(bytearray.fromhex(hexdigest), dtype=torch.uint8)
