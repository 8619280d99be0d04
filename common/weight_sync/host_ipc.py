"""The `ipc` wire without a GPU: processes of one host share the memory that weights are packed into."""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from common.weight_sync.collective import SENDER, Control, SyncError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MARK_BYTES = 16
LENT = struct.Struct(f"<{MARK_BYTES}sQQQQ")
"""Where lent bytes lie: the mark of their memory, the sender's process and file descriptor, the size, the offset."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A piece of memory that other processes can map, with its mark behind its last byte."""

    mark: bytes
    file: int
    data: Tensor


class HostIpcWire:
    """The sender lends its memory, each receiver copies from it: nothing goes through a socket.

    The memory is an anonymous file of the sender's, open to its user's processes through ``/proc``: nothing is left of
    it when the sender ends, however that is. Its mark tells it from anything else under the same numbers, as on
    another host or in another container.
    """

    def __init__(self, control: Control) -> None:
        import torch

        self.device: torch.device = torch.device("cpu")
        self._control = control
        self._own: list[Shared] = []
        self._others: dict[bytes, NDArray[np.uint8]] = {}

    def allocate(self, nbytes: int) -> Tensor:
        """See `Wire`."""
        import torch

        mark = secrets.token_bytes(MARK_BYTES)
        file = os.memfd_create("opcd-weights")
        os.ftruncate(file, nbytes + MARK_BYTES)
        whole = _map(file, nbytes + MARK_BYTES, mmap.ACCESS_WRITE)
        whole[nbytes:] = np.frombuffer(mark, np.uint8)
        self._own.append(Shared(mark, file, torch.from_numpy(whole[:nbytes])))
        return self._own[-1].data

    def broadcast(self, data: Tensor, what: str) -> None:
        """See `Wire`. The sender's `data` lies in memory of `allocate`, and may be written to when this returns."""
        if self._control.rank == SENDER:
            self._control.tell(self._lent(data), what)
            done = self._control.agree(1, what)
        else:
            done = self._control.agree(int(self._copy(self._control.tell(bytes(LENT.size), what), data)), what)
        if not done:
            raise SyncError(
                f"weight sync broke at {what}: sync.backend `ipc` is for processes of one host and one user that see "
                "each other under /proc, these do not; use `gloo`"
            )

    def close(self) -> None:
        """Let go of the memory; what others have mapped stays until they let go, too."""
        for shared in self._own:
            os.close(shared.file)
        self._own, self._others = [], {}

    def _lent(self, data: Tensor) -> bytes:
        for shared in self._own:
            offset = data.data_ptr() - shared.data.data_ptr()
            if 0 <= offset <= shared.data.numel() - data.numel():
                return LENT.pack(shared.mark, os.getpid(), shared.file, shared.data.numel(), offset)
        raise ValueError("only what lies in memory of `allocate` can be lent")

    def _copy(self, message: bytes, data: Tensor) -> bool:
        mark, process, file, nbytes, offset = LENT.unpack(message)
        if mark not in self._others:
            whole = _opened(f"/proc/{process}/fd/{file}", nbytes + MARK_BYTES)
            if whole is None or whole[nbytes:].tobytes() != mark:
                return False
            self._others[mark] = whole
        np.copyto(data.numpy(), self._others[mark][offset : offset + data.numel()])
        return True


def _opened(path: str, nbytes: int) -> NDArray[np.uint8] | None:
    """The file's memory, to be read; None where there is no such file of that size."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # should it be something else's pipe
    except OSError:
        return None
    try:
        return _map(file, nbytes, mmap.ACCESS_READ) if os.fstat(file).st_size == nbytes else None
    finally:
        os.close(file)


def _map(file: int, nbytes: int, access: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(file, nbytes, access=access), np.uint8)
