"""Sending end of a weight sync: choice of the sender by ``sync.backend``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from common.config.model import SyncConfig
from common.weight_sync.manifest import SyncManifest
from learner.publishing.file_sender import FileSender
from learner.publishing.group_sender import GroupSender
from learner.publishing.packer import SendReport

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Sender(Protocol):
    """Rank 0 of a weight group."""

    def send(self, tensors: Iterable[tuple[str, Tensor]], manifest: SyncManifest) -> SendReport:
        """Send all tensors of `manifest`; raises SyncError if they differ from it or a receiver is lost.

        After an error, open a new sender and let the receivers join its group.
        """
        ...

    def close(self) -> None:
        """Leave the group; safe to repeat."""
        ...


def open_sender(sync: SyncConfig, host: str, port: int, world_size: int, device: torch.device | str = "cpu") -> Sender:
    """Open the weight group as its sender; blocks until every receiver has joined. `device` holds the weights."""
    if sync.backend == "file":
        return FileSender(sync, host, port)
    return GroupSender(sync, host, port, world_size, device)
