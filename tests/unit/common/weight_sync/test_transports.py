"""GPU transports, as far as a CPU can test them: calls fit the installed torch, a hung broadcast ends."""

from __future__ import annotations

import ast
import inspect
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.model import SyncConfig
from common.weight_sync import transports
from common.weight_sync.collective import Control, SyncError
from common.weight_sync.transports import open_group
from tests.support.processes import free_port
from tests.support.weight_groups import HOST, together

EXPORTED = (
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
"""Parameters of ``rebuild_cuda_tensor`` that come from the exporting process."""


class Work:
    """A collective on a device that never ends, or that fails."""

    def __init__(self, *, polls: int | None = None, error: str | None = None) -> None:
        self._polls = polls
        self._error = error

    def is_completed(self) -> bool:
        if self._polls is None:
            return False
        self._polls -= 1
        return self._polls < 0

    def wait(self) -> None:
        if self._error:
            raise RuntimeError(self._error)


def test_a_broadcast_that_never_ends_is_a_sync_error_that_names_the_bucket() -> None:
    started = time.monotonic()
    with pytest.raises(SyncError, match=r"broke at bucket 3 \(a\): not complete after 0 s, a peer is lost"):
        transports.wait_watched(Work(), 0.2, "bucket 3 (a)")
    assert 0.2 <= time.monotonic() - started < 5


def test_a_broadcast_that_fails_is_a_sync_error() -> None:
    with pytest.raises(SyncError, match="broke at bucket 0: NCCL error"):
        transports.wait_watched(Work(polls=2, error="NCCL error"), 5, "bucket 0")


def test_a_broadcast_that_ends_is_waited_for() -> None:
    transports.wait_watched(Work(polls=3), 5, "bucket 0")


@pytest.mark.parametrize("aborts", [True, False])
def test_the_nccl_transport_aborts_its_communicator_when_a_broadcast_hangs(
    aborts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Group:
        aborted = False

        def broadcast(self, data: object, root: int) -> Work:
            return Work(polls=None if aborts else 1)

        def abort(self) -> None:
            self.aborted = True

    class Ready:
        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", lambda _: pytest.MonkeyPatch.context())
    monkeypatch.setattr(torch.cuda, "current_stream", Ready)
    transport = object.__new__(transports.NcclTransport)
    transport.device, transport._timeout_s, transport._group = torch.device("cuda"), 0.05, Group()
    if aborts:
        with pytest.raises(SyncError):
            transport.broadcast(torch.empty(1), "bucket 0")
    else:
        transport.broadcast(torch.empty(1), "bucket 0")
    assert transport._group.aborted == aborts


@pytest.mark.parametrize(
    ("backend", "why"),
    [("nccl", "no nccl"), ("ipc", "share one GPU: this member's weights lie on cpu")],
)
def test_a_transport_that_this_machine_lacks_is_named_at_both_ends(backend: Any, why: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("has it")
    port = free_port()
    sync = SyncConfig(backend=backend, timeout_s=20)
    errors = together(*(lambda rank=rank: open_group(sync, HOST, port, rank, 2, "cpu") for rank in range(2)))
    for error in errors:
        assert isinstance(error, SyncError)
        assert why in str(error)


def test_the_nccl_calls_fit_the_installed_torch() -> None:
    """A CPU build has no such class; the stubs that come with it describe it."""
    stubs = ast.parse((Path(torch.__file__).parent / "_C" / "_distributed_c10d.pyi").read_text())
    classes = {node.name: node for node in stubs.body if isinstance(node, ast.ClassDef)}
    group = classes["ProcessGroupNCCL"]
    methods = {node.name: node for node in group.body if isinstance(node, ast.FunctionDef)}
    assert [argument.arg for argument in methods["__init__"].args.args[1:]] == ["store", "rank", "size", "options"]
    assert "abort" in methods
    assert any(isinstance(node, ast.ClassDef) and node.name == "Options" for node in group.body)
    options = next(n for n in classes["Backend"].body if isinstance(n, ast.ClassDef) and n.name == "Options")
    assert "_timeout" in {node.name for node in options.body if isinstance(node, ast.FunctionDef)}
    work = {node.name for node in classes["Work"].body if isinstance(node, ast.FunctionDef)}
    assert {"is_completed", "wait"} <= work


def test_an_exported_buffer_arrives_as_the_arguments_of_torchs_own_rebuilder(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.multiprocessing import reductions

    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    exported: dict[str, Any] = dict.fromkeys(names) | {name: name.encode() for name in EXPORTED}
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _: (None, tuple(exported.values())))
    handles = transports.export(torch.empty(1))
    uuid, sent = transports.decode_handles(transports.encode_handles("GPU-1", [handles, handles]))
    assert (uuid, sent) == ("GPU-1", [handles, handles])

    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *values: dict(zip(names, values, strict=True)))
    rebuilt: Any = transports.rebuild(sent[0], 123, 5)
    assert {name: rebuilt[name] for name in EXPORTED} == {name: name.encode() for name in EXPORTED}
    assert (rebuilt["tensor_size"], rebuilt["storage_device"], rebuilt["dtype"]) == ((123,), 5, torch.uint8)


def test_torch_exports_in_the_order_of_its_rebuilders_parameters() -> None:
    from torch.multiprocessing import reductions

    source = inspect.getsource(reductions.reduce_tensor)
    start = source.index("rebuild_cuda_tensor,\n")
    block = source[start : source.index("\n        )", start)]
    values = [
        line.split("#")[0].strip().rstrip(",") for line in block.splitlines()[2:] if line.strip() not in ("(", "),")
    ]
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert len(values) == len(parameters)
    renamed = {"handle": "storage_handle"}
    assert [renamed.get(values[parameters.index(name)], values[parameters.index(name)]) for name in EXPORTED] == [
        *EXPORTED
    ]


def test_control_messages_come_from_the_sender_and_the_minimum_from_all() -> None:
    port = free_port()
    first, second = together(*(lambda rank=rank: Control(HOST, port, rank, 2, 20) for rank in range(2)))
    assert (first.rank, first.receivers, second.rank) == (0, 1, 1)
    sent = together(lambda: first.broadcast_bytes(b"abc", "x"), lambda: second.broadcast_bytes(b"???", "x"))
    assert sent == [b"abc", b"abc"]
    assert together(lambda: first.allreduce_min(2, "x"), lambda: second.allreduce_min(1, "x")) == [1, 1]
    assert sys.getrefcount(first._group) <= 3  # only its holder's: gloo hangs up when that lets go
