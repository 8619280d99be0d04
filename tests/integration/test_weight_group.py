"""The weight group between plain processes' threads: what is checked before weights are believed."""

from __future__ import annotations

import inspect
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import learner.publish
from common.collective import SyncError
from common.config import SyncConfig
from common.receiver import open_receiver
from common.weights import SyncManifest, TensorSpec
from learner.publish import open_sender
from rollout_workers.engine import init_info, update_info

TENSORS = {
    "a": torch.arange(10, dtype=torch.float32).reshape(2, 5),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.tensor(7.0),
    "d": torch.randn(100),
}


def manifest(bucket_bytes: int = 60, **shapes: tuple[int, ...]) -> SyncManifest:
    specs = (
        TensorSpec(name, str(t.dtype).removeprefix("torch."), shapes.get(name, tuple(t.shape)))
        for name, t in TENSORS.items()
    )
    return SyncManifest(tuple(specs), bucket_bytes)


def exchange(sent: SyncManifest, *expected: SyncManifest, tensors: Iterator[tuple[str, Tensor]] | None = None) -> list:
    """One sync from a sender to a receiver per manifest in `expected`; what each got, or the error it raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: list = [None] * (1 + len(expected))
    world = len(results)

    def guarded(place: int, work: Callable[[], object]) -> None:
        try:
            results[place] = work()
        except SyncError as error:
            results[place] = error

    def send() -> object:
        return open_sender("gloo", "127.0.0.1", port, world, 2.0).send(tensors or iter(TENSORS.items()), sent)

    def receive(rank: int, plan: SyncManifest) -> object:
        receiver = open_receiver(SyncConfig(timeout_s=2.0), "127.0.0.1", port, rank, world, "cpu")
        return dict(receiver.receive(plan))

    threads = [threading.Thread(target=guarded, args=(0, send))]
    threads += [
        threading.Thread(target=guarded, args=(rank, lambda rank=rank, plan=plan: receive(rank, plan)))
        for rank, plan in enumerate(expected, start=1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_every_receiver_gets_every_tensor_bit_for_bit() -> None:
    report, first, second = exchange(manifest(), manifest(), manifest())
    assert report.bytes == 10 * 4 + 3 * 2 + 4 + 400
    for received in (first, second):
        assert list(received) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert received[name].dtype == tensor.dtype
            assert received[name].equal(tensor)


@pytest.mark.parametrize("other", [manifest(61), manifest(a=(5, 2))])
def test_another_plan_is_refused_before_a_byte_is_believed(other: SyncManifest) -> None:
    _, received = exchange(manifest(), other)
    assert isinstance(received, SyncError)
    assert "do not agree" in str(received)


def test_bytes_that_change_on_the_way_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = learner.publish.wire_digest
    monkeypatch.setattr(learner.publish, "wire_digest", lambda data: honest(data ^ 1))
    _, received = exchange(manifest(), manifest())
    assert isinstance(received, SyncError)
    assert "bucket 0 (a ...) arrived with other bytes" in str(received)


def test_weights_that_do_not_fit_the_manifest_are_not_sent() -> None:
    swapped = iter([("b", TENSORS["b"]), ("a", TENSORS["a"])])
    sent, received = exchange(manifest(), manifest(), tensors=swapped)
    assert isinstance(sent, SyncError)
    assert "the learner's next weight is" in str(sent)
    assert isinstance(received, SyncError)  # times out, named


def test_a_receiver_that_never_comes_is_named() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SyncError, match=r"rank 0 of 2 could not join .* within 1 s"):
        open_sender("gloo", "127.0.0.1", port, 2, 1.0)


def test_buckets_hold_everything_in_order_and_never_mix_types() -> None:
    buckets = list(manifest(60).buckets())
    assert [spec.name for bucket in buckets for spec in bucket] == list(TENSORS)
    assert all(len({spec.dtype for spec in bucket}) == 1 for bucket in buckets)
    assert all(sum(spec.nbytes for spec in bucket) <= 60 or len(bucket) == 1 for bucket in buckets)


def test_the_nccl_calls_fit_the_installed_vllm() -> None:
    """They can only run on GPUs; their names and arguments can be checked anywhere."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, trainer_init
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    sync = SyncConfig(backend="nccl", bucket_bytes=1234)
    worker = NCCLWeightTransferInitInfo(**init_info(sync, "localhost", 1, 3, 5))
    assert (worker.rank_offset, worker.world_size, worker.packed_buffer_size_bytes) == (3, 5, 1234)
    update = NCCLWeightTransferUpdateInfo(**update_info(manifest(), "nccl"))
    assert update.names == list(TENSORS)
    assert update.shapes[0] == [2, 5]
    inspect.signature(trainer_init).bind({"master_address": "localhost", "master_port": 1, "world_size": 5})
    inspect.signature(packed_nccl_broadcast_producer).bind(
        iterator=iter(()), group=None, src=0, post_iter_func=lambda pair: pair[1], buffer_size_bytes=1234
    )
