"""The weight group: learner rank 0 sends, every engine worker and teacher receives. Apart from any default group.

Two channels. *Control* is gloo, for a few bytes at a time: plans, checksums, what members agree on. The *wire* carries
the weights' bytes and is what ``sync.backend`` names. Every wait on either has a limit and an error that says what was
waited for; after one the group is of no use.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from common.config.model import SyncConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SENDER = 0


class SyncError(RuntimeError):
    """A weight sync that cannot be trusted: the run must stop, or form the group anew and send everything again."""


class Wire(Protocol):
    """What carries the weights' bytes."""

    device: torch.device
    """Where a tensor must lie to be sent or received."""

    def allocate(self, nbytes: int) -> Tensor:
        """Memory, ``[nbytes]`` of bytes, from which the sender can send; kept until `close`."""
        ...

    def broadcast(self, data: Tensor, what: str) -> None:
        """One blocking broadcast of a byte tensor from the sender; `what` names it in the SyncError."""
        ...

    def close(self) -> None:
        """Give up what this end holds, whatever state the other ends are in."""
        ...


class Control:
    """One member's end of the control channel, and the only holder of its gloo group.

    gloo closes its connections when the group is destroyed, not before: a frame of a traceback that held it, too,
    would keep the other members waiting.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        """Meet the members at ``host:port``, where rank 0 listens; SyncError when not all come within `timeout_s`."""
        import torch.distributed as dist

        ends: Any = dist  # re-exported without being declared

        self.rank = rank
        self.receivers = world_size - 1
        timeout = timedelta(seconds=timeout_s)
        try:
            self.store = ends.TCPStore(host, port, world_size, is_master=rank == SENDER, timeout=timeout)
            store = ends.PrefixStore("opcd-weights", self.store)
            self._group: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        except RuntimeError as error:
            raise SyncError(
                f"rank {rank} of {world_size} could not join the weight group at {host}:{port} within "
                f"{timeout_s:.0f} s: {error}; raise sync.timeout_s if engines are slow to start"
            ) from error

    def broadcast(self, data: Tensor, what: str) -> None:
        """One blocking broadcast from the sender; `what` names it in the SyncError of a lost peer or a time-out."""
        self._check_open()
        try:
            self._group.broadcast(data, SENDER).wait()
        except RuntimeError as error:
            raise SyncError(f"weight sync broke at {what}: {error}") from error

    def tell(self, message: bytes, what: str) -> bytes:
        """`message` of the sender at every member; the others pass as many bytes of anything."""
        import torch

        data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        self.broadcast(data, what)
        return bytes(data.numpy())

    def agree(self, value: int, what: str) -> int:
        """The smallest `value` of all members, at every member."""
        import torch
        import torch.distributed as dist

        self._check_open()
        ends: Any = dist
        lowest = torch.tensor([value])
        try:
            self._group.allreduce([lowest], ends.ReduceOp.MIN).wait()
        except RuntimeError as error:
            raise SyncError(f"weight sync broke at {what}: {error}") from error
        return int(lowest)

    def close(self) -> None:
        """Leave; members that wait for this one get an error at once. Harmless when repeated."""
        self._group = self.store = None

    def _check_open(self) -> None:
        if self._group is None:
            raise SyncError("this member has left its weight group: join a new one first")


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """One member's ends of both channels."""

    control: Control
    wire: Wire

    def close(self) -> None:
        """Leave; harmless when repeated."""
        self.wire.close()
        self.control.close()


def open_group(
    sync: SyncConfig, host: str, port: int, rank: int, world_size: int, device: torch.device | str
) -> WeightGroup:
    """Meet the other members at ``host:port``, where the sender listens; `device` is where this member's model lies.

    Raises SyncError when not all come within ``sync.timeout_s``, and for a wire that this machine does not have.
    """
    import torch

    from common.weight_sync import transports

    control = Control(host, port, rank, world_size, sync.timeout_s)
    try:
        if sync.backend == "nccl":
            return WeightGroup(control, transports.NcclWire(control, world_size, torch.device(device), sync.timeout_s))
        if sync.backend == "ipc":
            return WeightGroup(control, transports.open_ipc(control, torch.device(device)))
        return WeightGroup(control, transports.GlooWire(control))
    except BaseException:
        control.close()
        raise
