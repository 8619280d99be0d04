"""Reused host memory: faulting in a fresh page costs as much as several copies of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BufferPool:
    """Byte tensors in reused memory: host memory returns to the pool when no tensor views it any more.

    On a GPU torch's own allocator does the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._device: Any = device
        self._blocks: list[NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> Tensor:
        """Return an uninitialised tensor ``[nbytes]``, valid as long as it or a view of it lives."""
        import torch

        if self._device.type != "cpu":
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        for index in range(len(self._blocks)):
            # Two references: the list's and the argument's. A tensor on the block is a third.
            if sys.getrefcount(self._blocks[index]) == 2:
                if len(self._blocks[index]) < nbytes:
                    self._blocks[index] = np.empty(nbytes, np.uint8)
                return torch.from_numpy(self._blocks[index][:nbytes])
        self._blocks.append(np.empty(nbytes, np.uint8))
        return torch.from_numpy(self._blocks[-1][:nbytes])
