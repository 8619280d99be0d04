"""A sender and receivers of one weight group, as threads of the test's process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec
from common.weight_sync.receiver import Receiver, open_receiver
from learner.publishing.sender import Sender, open_sender
from tests.support.processes import free_port

HOST = "127.0.0.1"


def manifest_of(tensors: dict[str, Tensor], bucket_bytes: int = 60, version: int | None = None) -> SyncManifest:
    """The plan that fits `tensors`."""
    return SyncManifest(
        tuple(TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()),
        bucket_bytes,
        version,
    )


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run all calls at once; returns their results, SyncErrors included."""

    def guarded(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except SyncError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return [done.result() for done in [pool.submit(guarded, work) for work in works]]


def open_all(sync: SyncConfig, receivers: int) -> tuple[Sender, list[Receiver]]:
    """A group with that many receivers, complete."""
    port, world = free_port(), receivers + 1

    def join(rank: int) -> Callable[[], Receiver]:
        return lambda: open_receiver(sync, HOST, port, rank, world, "cpu")

    sender, *joined = together(lambda: open_sender(sync, HOST, port, world), *map(join, range(1, world)))
    return sender, joined


def sync_once(
    sender: Sender,
    receivers: Sequence[Receiver],
    sent: SyncManifest,
    tensors: Iterable[tuple[str, Tensor]],
    expected: Sequence[SyncManifest] | None = None,
) -> list[Any]:
    """[the sender's report, what each receiver got by name], or the SyncError of each; copies."""

    def receive(receiver: Receiver, plan: SyncManifest) -> Callable[[], dict[str, Tensor]]:
        return lambda: {name: tensor.clone() for name, tensor in receiver.receive(plan)}

    plans = expected or [sent] * len(receivers)
    return together(lambda: sender.send(tensors, sent), *map(receive, receivers, plans))


def same(received: Any, tensors: dict[str, Tensor]) -> bool:
    """Are names, order, types and every bit the same?"""
    return list(received) == list(tensors) and all(
        received[name].dtype == tensor.dtype and received[name].equal(tensor) for name, tensor in tensors.items()
    )
