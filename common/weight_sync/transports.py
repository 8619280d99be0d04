"""The wires of a weight group: gloo between hosts' memories, nccl between GPUs, ipc within one GPU or one host."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import msgpack

from common.weight_sync.collective import SENDER, Control, SyncError, Wire
from common.weight_sync.host_buffers import host_buffer
from common.weight_sync.host_ipc import HostIpcWire

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POLL_S = 0.0005
LENGTH_BYTES = 8


class GlooWire:
    """Through host memory, over the control channel itself."""

    def __init__(self, control: Control) -> None:
        import torch

        self._control = control
        self.device = torch.device("cpu")

    def allocate(self, nbytes: int) -> Tensor:
        """See `Wire`."""
        return host_buffer(nbytes)

    def broadcast(self, data: Tensor, what: str) -> None:
        """See `Wire`."""
        self._control.broadcast(data, what)

    def close(self) -> None:
        """Nothing of its own."""


class NcclWire:
    """Between GPUs, one per member, over torch's own nccl group, which meets in the control channel's store.

    nccl waits for a lost peer for ever. So each broadcast is watched, and past `timeout_s` its communicator is aborted,
    which ends the kernel. torch's watchdog would end the process instead: it gets a longer limit.
    """

    def __init__(self, control: Control, world_size: int, device: torch.device, timeout_s: float) -> None:
        import torch.distributed as dist

        if not dist.is_nccl_available():
            raise SyncError("sync.backend: this build of torch has no nccl; use `gloo`")
        ends: Any = dist
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=2 * timeout_s + 60)
        store = ends.PrefixStore("opcd-weights-nccl", control.store)
        self.device = device
        self._timeout_s = timeout_s
        self._group = dist.ProcessGroupNCCL(store, control.rank, world_size, options)

    def allocate(self, nbytes: int) -> Tensor:
        """See `Wire`."""
        return _on_gpu(nbytes, self.device)

    def broadcast(self, data: Tensor, what: str) -> None:
        """See `Wire`; `data` is complete on its device when this returns."""
        import torch

        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # whoever filled `data` did so on a stream of its own
            try:
                wait_watched(cast(Any, self._group).broadcast(data, SENDER), self._timeout_s, what)
            except SyncError:
                self._group.abort()
                raise

    def close(self) -> None:
        """Abort: an orderly end would wait for peers that may be gone."""
        self._group.abort()


class IpcWire:
    """Within one GPU that the processes share: the sender lends its memory, each receiver copies from it."""

    def __init__(self, control: Control, device: torch.device) -> None:
        import torch

        self.device = device
        self._control = control
        self._uuid = str(torch.cuda.get_device_properties(device).uuid)

    def allocate(self, nbytes: int) -> Tensor:
        """See `Wire`."""
        return _on_gpu(nbytes, self.device)

    def broadcast(self, data: Tensor, what: str) -> None:
        """See `Wire`. The lent memory may be used again when this returns: all have copied."""
        import torch

        with torch.cuda.device(self.device):
            if self._control.rank == SENDER:
                torch.cuda.current_stream().synchronize()
                # torch counts one reader for each export, so every receiver gets an export of its own.
                self._tell(pack_handles(self._uuid, [export(data) for _ in range(self._control.receivers)]), what)
                done = self._control.agree(1, what)
                torch.cuda.ipc_collect()
            else:
                done = self._control.agree(int(self._copy(self._hear(what), data)), what)
        if not done:
            raise SyncError(f"weight sync broke at {what}: `ipc` is for processes that share one GPU, these do not")

    def close(self) -> None:
        """Nothing of its own."""

    def _copy(self, message: bytes, data: Tensor) -> bool:
        import torch

        uuid, handles = unpack_handles(message)
        if uuid != self._uuid:
            return False
        lent = rebuild(handles[self._control.rank - 1], data.numel(), torch.cuda.current_device())
        data.copy_(lent)
        torch.cuda.current_stream().synchronize()
        return True

    def _tell(self, message: bytes, what: str) -> None:
        self._control.tell(len(message).to_bytes(LENGTH_BYTES, "little"), what)
        self._control.tell(message, what)

    def _hear(self, what: str) -> bytes:
        length = int.from_bytes(self._control.tell(bytes(LENGTH_BYTES), what), "little")
        return self._control.tell(bytes(length), what)


def open_ipc(control: Control, device: torch.device) -> Wire:
    """The wire between processes that share a GPU, or, where none of them has one, a host's memory.

    Raises SyncError where some have a GPU and some do not.
    """
    on_gpu = device.type == "cuda"
    everywhere, nowhere = control.agree(int(on_gpu), "the ipc wire"), control.agree(int(not on_gpu), "the ipc wire")
    if not everywhere and not nowhere:
        raise SyncError(
            f"sync.backend `ipc`: this member's weights lie on {device}, another's do not, so no memory is shared; use "
            "`gloo`"
        )
    return IpcWire(control, device) if on_gpu else HostIpcWire(control)


def _on_gpu(nbytes: int, device: torch.device) -> Tensor:
    import torch

    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def wait_watched(work: Any, timeout_s: float, what: str) -> None:
    """Wait for a collective that runs on a device; SyncError, naming `what`, when it fails or takes too long."""
    limit = time.monotonic() + timeout_s
    try:
        while not work.is_completed():
            if time.monotonic() > limit:
                raise SyncError(f"weight sync broke at {what}: not complete after {timeout_s:.0f} s, a peer is lost")
            time.sleep(POLL_S)
        work.wait()
    except RuntimeError as error:
        if isinstance(error, SyncError):
            raise
        raise SyncError(f"weight sync broke at {what}: {error}") from error


EXPORTED = (
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""Arguments of torch's ``rebuild_cuda_tensor`` that only the exporting process knows, by name."""


def export(data: Tensor) -> dict[str, Any]:
    """Handles by which one other process can map the memory of a flat byte tensor on a GPU."""
    from torch.multiprocessing.reductions import reduce_tensor

    rebuilt, arguments = reduce_tensor(data)
    named = dict(zip(parameters_of(rebuilt), arguments, strict=True))
    return {name: named[name] for name in EXPORTED}


def rebuild(handles: dict[str, Any], nbytes: int, device_index: int) -> Tensor:
    """The other process's byte tensor, mapped on this process's number for the same GPU."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return rebuild_cuda_tensor(
        tensor_cls=torch.Tensor,
        tensor_size=(nbytes,),
        tensor_stride=(1,),
        tensor_offset=0,
        storage_cls=torch.UntypedStorage,
        dtype=torch.uint8,
        storage_device=device_index,
        requires_grad=False,
        **handles,
    )


def parameters_of(function: Any) -> list[str]:
    """Names of a function's parameters, in order."""
    import inspect

    return list(inspect.signature(function).parameters)


def pack_handles(uuid: str, handles: list[dict[str, Any]]) -> bytes:
    """A GPU's uuid and one receiver's handles after the other's, as they travel."""
    return msgpack.packb([uuid, handles])


def unpack_handles(message: bytes) -> tuple[str, list[dict[str, Any]]]:
    """What `pack_handles` packed."""
    uuid, handles = msgpack.unpackb(message)
    return uuid, handles
