"""What of the GPU wires can be proved without one: the calls fit the installed torch, and a hung broadcast ends."""

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
from common.weight_sync.collective import Control, SyncError, open_group
from tests.support.weight_groups import HOST, free_port, together


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
def test_the_nccl_wire_aborts_its_communicator_when_a_broadcast_hangs(
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
    wire = object.__new__(transports.NcclWire)
    wire.device, wire._timeout_s, wire._group = torch.device("cuda"), 0.05, Group()
    if aborts:
        with pytest.raises(SyncError):
            wire.broadcast(torch.empty(1), "bucket 0")
    else:
        wire.broadcast(torch.empty(1), "bucket 0")
    assert wire._group.aborted == aborts


@pytest.mark.parametrize(
    ("backend", "devices", "why"),
    [("nccl", ("cpu", "cpu"), "no nccl"), ("ipc", ("cpu", "cuda"), "no memory is shared")],
)
def test_a_wire_that_this_machine_lacks_is_named_at_both_ends(backend: Any, devices: Any, why: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("has it")
    port = free_port()
    sync = SyncConfig(backend=backend, timeout_s=20)
    errors = together(*(lambda rank=rank: open_group(sync, HOST, port, rank, 2, devices[rank]) for rank in range(2)))
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


def test_the_ipc_calls_fit_the_installed_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles go over the wire and into ``rebuild_cuda_tensor`` under the names that it has."""
    from torch.multiprocessing import reductions

    arguments = dict.fromkeys(inspect.signature(reductions.rebuild_cuda_tensor).parameters, 0)
    arguments |= {"storage_handle": b"h" * 64, "ref_counter_handle": b"r", "event_handle": b"e"}
    monkeypatch.setattr(reductions, "reduce_tensor", lambda _: (rebuild, tuple(arguments.values())))

    def rebuild(**_: object) -> None: ...

    rebuild.__signature__ = inspect.signature(reductions.rebuild_cuda_tensor)
    handles = transports.export(torch.empty(1))
    uuid, travelled = transports.unpack_handles(transports.pack_handles("GPU-1", [handles, handles]))
    assert (uuid, travelled) == ("GPU-1", [handles, handles])

    seen: dict[str, Any] = {}
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda **given: seen.update(given))
    transports.rebuild(travelled[0], 123, 5)
    assert set(seen) == set(arguments)
    assert (seen["tensor_size"], seen["storage_device"], seen["dtype"]) == ((123,), 5, torch.uint8)
    assert seen["storage_handle"] == b"h" * 64


def test_the_ipc_exporters_arguments_are_in_the_order_of_the_rebuilders() -> None:
    """`export` names what ``reduce_tensor`` returns by the parameters of the function that it returns with it."""
    from torch.multiprocessing import reductions

    source = inspect.getsource(reductions.reduce_tensor)
    start = source.index("rebuild_cuda_tensor,\n")
    block = source[start : source.index("\n        )", start)]
    values = [
        line.split("#")[0].strip().rstrip(",") for line in block.splitlines()[2:] if line.strip() not in ("(", "),")
    ]
    parameters = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert len(values) == len(parameters)
    at = {name: values[parameters.index(name)] for name in transports.EXPORTED}
    assert at == {
        "storage_handle": "handle",
        "storage_size_bytes": "storage_size_bytes",
        "storage_offset_bytes": "storage_offset_bytes",
        "ref_counter_handle": "ref_counter_handle",
        "ref_counter_offset": "ref_counter_offset",
        "event_handle": "event_handle",
        "event_sync_required": "event_sync_required",
    }


def test_a_control_channel_knows_its_place() -> None:
    port = free_port()
    first, second = together(*(lambda rank=rank: Control(HOST, port, rank, 2, 20) for rank in range(2)))
    assert (first.rank, first.receivers, second.rank) == (0, 1, 1)
    assert together(lambda: first.tell(b"abc", "x"), lambda: second.tell(b"???", "x")) == [b"abc", b"abc"]
    assert together(lambda: first.agree(2, "x"), lambda: second.agree(1, "x")) == [1, 1]
    assert sys.getrefcount(first._group) <= 3  # only its holder's: gloo hangs up when that lets go
