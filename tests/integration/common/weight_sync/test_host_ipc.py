"""Weights through memory that processes of one host share: across processes, again and again, and what is refused."""

from __future__ import annotations

import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from common.config.model import SyncConfig
from common.weight_sync import host_ipc
from common.weight_sync.collective import Control, SyncError
from common.weight_sync.host_ipc import LENT, HostIpcWire
from common.weight_sync.receiver import open_receiver
from learner.publishing.packer import open_sender
from tests.support.weight_groups import HOST, free_port, manifest_of, together

SYNC = SyncConfig(timeout_s=60.0, backend="ipc")
SHAPES = {"a": (7, 300), "b": (1000,), "c": (3,)}
VERSIONS = 4


def weights(version: int) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float(version)) for name, shape in SHAPES.items()}


def receive_all(port: int, answer: Connection) -> None:
    receiver = open_receiver(SYNC, HOST, port, 1, 2, "cpu")
    plan = manifest_of(weights(0), 5000)
    for version in range(VERSIONS):
        got = {name: tensor.clone() for name, tensor in receiver.receive(plan)}
        answer.send(all(got[name].equal(tensor) for name, tensor in weights(version).items()))
    receiver.close()


def test_another_process_gets_every_version_bit_for_bit() -> None:
    """More versions than buckets of memory: what is written over is not what an earlier sync lent."""
    port, context = free_port(), multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=receive_all, args=(port, there))
    process.start()
    sender = open_sender(SYNC, HOST, port, 2)
    for version in range(VERSIONS):
        sender.send(weights(version).items(), manifest_of(weights(0), 5000))
        assert here.poll(60)
        assert here.recv()
    sender.close()
    process.join(60)
    assert process.exitcode == 0
    assert "opcd-weights" in Path("/proc/self/maps").read_text()
    del sender
    gc.collect()
    assert "opcd-weights" not in Path("/proc/self/maps").read_text()  # the memory goes with its owner


@pytest.fixture
def wires() -> list[HostIpcWire]:
    port = free_port()
    controls = together(*(lambda rank=rank: Control(HOST, port, rank, 2, 20) for rank in range(2)))
    return [HostIpcWire(control) for control in controls]


def test_lent_memory_is_found_at_its_place(wires: list[HostIpcWire]) -> None:
    first, second = (wires[0].allocate(100) for _ in range(2))
    first[:] = 1
    second[:] = torch.arange(100)
    got = torch.zeros(10, dtype=torch.uint8)
    together(lambda: wires[0].broadcast(second[30:40], "x"), lambda: wires[1].broadcast(got, "x"))
    assert got.tolist() == list(range(30, 40))


@pytest.mark.parametrize("fault", ["mark", "file", "size"])
def test_memory_of_another_host_or_container_is_not_taken_for_the_senders(
    wires: list[HostIpcWire], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers may mean something here, too: another memory, another file, nothing at all."""
    lent, other = wires[0].allocate(100), wires[0].allocate(100)
    files = [shared.file for shared in wires[0]._own]
    tell = Control.tell

    def elsewhere(control: Control, message: bytes, what: str) -> bytes:
        told = tell(control, message, what)
        mark, process, file, nbytes, offset = LENT.unpack(told)
        wrong = {"mark": (files[1], nbytes), "file": (10_000, nbytes), "size": (file, nbytes - 1)}[fault]
        return LENT.pack(mark, process, *wrong, offset)

    monkeypatch.setattr(host_ipc.Control, "tell", elsewhere)
    lent[:], other[:] = 1, 2
    got = torch.zeros(100, dtype=torch.uint8)
    errors = together(lambda: wires[0].broadcast(lent, "bucket 0"), lambda: wires[1].broadcast(got, "bucket 0"))
    for error in errors:
        assert isinstance(error, SyncError)
        assert "broke at bucket 0: sync.backend `ipc` is for processes of one host" in str(error)
    assert not got.any()


def test_only_what_can_be_lent_is_lent(wires: list[HostIpcWire]) -> None:
    wires[0].allocate(100)
    with pytest.raises(ValueError, match="memory of `allocate`"):
        wires[0].broadcast(torch.zeros(10, dtype=torch.uint8), "x")
