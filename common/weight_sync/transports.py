"""Transports of a weight group: gloo between hosts' memories, nccl between GPUs, ipc within one GPU.

vLLM's own nccl and ipc weight-transfer engines are not used: they check no bytes, plan or version, cannot abort for a
lost peer, and have no receiving end outside a vLLM worker (a live teacher needs one).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgpack

from common.config.model import SyncConfig
from common.weight_sync.collective import SENDER, Control, SyncError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POLL_S = 0.0005


class Transport(Protocol):
    """Moves the bytes of the weights; ``sync.backend`` selects the implementation."""

    device: torch.device
    """Device on which tensors are sent and received."""

    def allocate(self, nbytes: int) -> Tensor:
        """Allocate ``[nbytes]`` uint8 memory that the sender can send from."""
        ...

    def broadcast(self, data: Tensor, label: str) -> None:
        """Broadcast a byte tensor from the sender and wait for it; a SyncError names `label`."""
        ...

    def close(self) -> None:
        """Release this end, whatever state the other ends are in."""
        ...


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """One member's ends of both channels; any timeout or lost peer makes the group useless."""

    control: Control
    transport: Transport

    def close(self) -> None:
        """Leave the group; safe to repeat."""
        self.transport.close()
        self.control.close()


def open_group(
    sync: SyncConfig, host: str, port: int, rank: int, world_size: int, device: torch.device | str
) -> WeightGroup:
    """Join the weight group at ``host:port``, where the sender listens; `device` holds this member's model.

    Raises SyncError if not all members join within ``sync.timeout_s``, or if this machine lacks the transport.
    """
    import torch

    control = Control(host, port, rank, world_size, sync.timeout_s)
    transport: Transport
    try:
        if sync.backend == "nccl":
            transport = NcclTransport(control, world_size, torch.device(device), sync.timeout_s)
        elif sync.backend == "ipc":
            transport = IpcTransport(control, torch.device(device))
        else:
            transport = GlooTransport(control)
    except BaseException:
        control.close()
        raise
    return WeightGroup(control, transport)


class GlooTransport:
    """Broadcast through host memory, over the control channel."""

    def __init__(self, control: Control) -> None:
        import torch

        self._control = control
        self.device = torch.device("cpu")

    def allocate(self, nbytes: int) -> Tensor:
        """See `Transport`."""
        return host_buffer(nbytes)

    def broadcast(self, data: Tensor, label: str) -> None:
        """See `Transport`."""
        self._control.broadcast(data, label)

    def close(self) -> None:
        """Do nothing: the control channel owns the group."""


class NcclTransport:
    """Broadcast between GPUs, one per member, over a torch nccl group that meets in the control channel's store.

    nccl waits for a lost peer without limit. So this class watches each broadcast and aborts the communicator after
    `timeout_s`, which ends the kernel. torch's watchdog would end the process instead: it gets a longer limit.
    """

    def __init__(self, control: Control, world_size: int, device: torch.device, timeout_s: float) -> None:
        import torch.distributed as dist

        if not control.allreduce_min(int(dist.is_nccl_available()), "the nccl transport"):
            raise SyncError("sync.backend: this build of torch has no nccl, here or at another member; use `gloo`")
        untyped: Any = dist
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=2 * timeout_s + 60)
        store = untyped.PrefixStore("opcd-weights-nccl", control.store)
        self.device = device
        self._timeout_s = timeout_s
        self._group = dist.ProcessGroupNCCL(store, control.rank, world_size, options)

    def allocate(self, nbytes: int) -> Tensor:
        """See `Transport`."""
        return _gpu_buffer(nbytes, self.device)

    def broadcast(self, data: Tensor, label: str) -> None:
        """See `Transport`; `data` is complete on its device when this returns."""
        import torch

        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # `data` was filled on another stream than nccl's
            try:
                wait_watched(cast(Any, self._group).broadcast(data, SENDER), self._timeout_s, label)
            except SyncError:
                self._group.abort()
                raise

    def close(self) -> None:
        """Abort: an orderly shutdown would wait for peers that may be gone."""
        self._group.abort()


class IpcTransport:
    """Copy within one GPU that all processes share: the sender exports its memory, each receiver copies from it."""

    def __init__(self, control: Control, device: torch.device) -> None:
        import torch

        if not control.allreduce_min(int(device.type == "cuda"), "the ipc transport"):
            raise SyncError(
                f"sync.backend `ipc` is for processes that share one GPU: this member's weights lie on {device}, and "
                "not all members' on a GPU; use `gloo`"
            )
        self.device = device
        self._control = control
        self._uuid = str(torch.cuda.get_device_properties(device).uuid)

    def allocate(self, nbytes: int) -> Tensor:
        """See `Transport`."""
        return _gpu_buffer(nbytes, self.device)

    def broadcast(self, data: Tensor, label: str) -> None:
        """See `Transport`. The sender may reuse `data` when this returns: every receiver has copied it."""
        import torch

        with torch.cuda.device(self.device):
            if self._control.rank == SENDER:
                torch.cuda.current_stream().synchronize()
                # torch counts one reader per export, so every receiver gets its own.
                message = encode_handles(self._uuid, [export(data) for _ in range(self._control.receivers)])
                self._control.broadcast_int(len(message), label)
                self._control.broadcast_bytes(message, label)
                copied = self._control.allreduce_min(1, label)
                torch.cuda.ipc_collect()
            else:
                message = self._control.broadcast_bytes(bytes(self._control.broadcast_int(0, label)), label)
                copied = self._control.allreduce_min(int(self._copy(message, data)), label)
        if not copied:
            raise SyncError(f"weight sync broke at {label}: `ipc` is for processes that share one GPU, these do not")

    def close(self) -> None:
        """Do nothing: no resource outlives a broadcast."""

    def _copy(self, message: bytes, data: Tensor) -> bool:
        import torch

        uuid, handles = decode_handles(message)
        if uuid != self._uuid:
            return False
        data.copy_(rebuild(handles[self._control.rank - 1], data.numel(), torch.cuda.current_device()))
        torch.cuda.current_stream().synchronize()
        return True


def host_buffer(nbytes: int) -> Tensor:
    """Allocate ``[nbytes]`` uint8 host memory to copy weights into, pinned if they may come from a GPU."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _gpu_buffer(nbytes: int, device: torch.device) -> Tensor:
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def wait_watched(work: Any, timeout_s: float, label: str) -> None:
    """Wait for a device collective; raises SyncError with `label` if it fails or takes longer than `timeout_s`."""
    limit = time.monotonic() + timeout_s
    try:
        while not work.is_completed():
            if time.monotonic() > limit:
                raise SyncError(f"weight sync broke at {label}: not complete after {timeout_s:.0f} s, a peer is lost")
            time.sleep(POLL_S)
        work.wait()
    except RuntimeError as error:
        if isinstance(error, SyncError):
            raise
        raise SyncError(f"weight sync broke at {label}: {error}") from error


# --- CUDA handles ---------------------------------------------------------------------------------------------------

Handles = list[Any]
"""Arguments of torch's ``rebuild_cuda_tensor`` that only the exporting process knows: storage handle, size and offset,
then reference counter handle and offset, event handle and flag. Plain values for msgpack: the group's socket is not
authenticated, so nothing is unpickled."""


def export(data: Tensor) -> Handles:
    """Export a flat byte tensor on a GPU, from the start of its storage, to one other process."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(data)
    return [*arguments[7:10], *arguments[11:15]]


def rebuild(handles: Handles, nbytes: int, device_index: int) -> Tensor:
    """Map the exported byte tensor on this process's index of the same GPU."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    tensor: list[Any] = [torch.Tensor, (nbytes,), (1,), 0, torch.UntypedStorage, torch.uint8, device_index]
    arguments = [*tensor, *handles[:3], False, *handles[3:]]
    return rebuild_cuda_tensor(*arguments)


def encode_handles(uuid: str, exports: list[Handles]) -> bytes:
    """Encode a GPU's uuid and one export per receiver."""
    return msgpack.packb([uuid, exports])


def decode_handles(message: bytes) -> tuple[str, list[Handles]]:
    """Decode the message of `encode_handles`."""
    uuid, exports = msgpack.unpackb(message)
    return uuid, exports
