"""Control channel of a weight group: a gloo group for small messages (plans, checksums, agreement)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SENDER = 0


class SyncError(RuntimeError):
    """A weight sync that cannot be trusted: stop the run, or form a new group and send everything again."""


class Control:
    """One member's end of the control channel, and the only holder of its gloo group.

    gloo closes its connections when the group is destroyed, not before: a traceback frame that also held the group
    would keep the other members waiting.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        """Join the group at ``host:port``, where rank 0 listens.

        Raises SyncError if not all members join within `timeout_s`. The same limit holds for every later call.
        """
        import torch.distributed as dist

        untyped: Any = dist  # re-exports names without declaring them

        self.rank = rank
        self.receivers = world_size - 1
        timeout = timedelta(seconds=timeout_s)
        try:
            self.store = untyped.TCPStore(host, port, world_size, is_master=rank == SENDER, timeout=timeout)
            store = untyped.PrefixStore("opcd-weights", self.store)
            self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        except RuntimeError as error:
            raise SyncError(
                f"rank {rank} of {world_size} could not join the weight group at {host}:{port} within "
                f"{timeout_s:.0f} s: {error}; raise sync.timeout_s if engines are slow to start"
            ) from error

    def broadcast(self, data: Tensor, label: str) -> None:
        """Broadcast `data` from the sender; the SyncError of a lost peer or a timeout names `label`."""
        self._check_open()
        try:
            self._group.broadcast(data, SENDER).wait()
        except RuntimeError as error:
            raise SyncError(f"weight sync broke at {label}: {error}") from error

    def broadcast_bytes(self, message: bytes, label: str) -> bytes:
        """Return the sender's `message` on every member; receivers pass a placeholder of the same length."""
        import torch

        data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        self.broadcast(data, label)
        return bytes(data.numpy())

    def broadcast_int(self, value: int, label: str) -> int:
        """Return the sender's `value` on every member; receivers pass any."""
        import torch

        number = torch.tensor([value])
        self.broadcast(number, label)
        return int(number)

    def allreduce_min(self, value: int, label: str) -> int:
        """Return the smallest `value` of all members on every member."""
        import torch
        import torch.distributed as dist

        self._check_open()
        untyped: Any = dist
        lowest = torch.tensor([value])
        try:
            self._group.allreduce([lowest], untyped.ReduceOp.MIN).wait()
        except RuntimeError as error:
            raise SyncError(f"weight sync broke at {label}: {error}") from error
        return int(lowest)

    def close(self) -> None:
        """Leave the group; members that wait for this one get an error at once. Safe to repeat."""
        self._group = self.store = None

    def _check_open(self) -> None:
        if self._group is None:
            raise SyncError("this member has left its weight group: join a new one first")
