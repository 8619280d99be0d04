"""Members of the weight-sync checks in other processes, which a run has as Ray actors.

Imports little: every process imports this module.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.protocol.schema import ScoreItem, TokenSequence
from common.weight_sync.checksum import mixed_sum
from common.weight_sync.manifest import SyncManifest
from common.weight_sync.receiver import Receiver, open_receiver

HOST = "127.0.0.1"
START_S = 300.0
"""Longest wait for an answer; the limit of the check usually ends it first."""


class Receiving:
    """A process with one object, made by `make(*arguments)`; `call` runs a method of it and returns the result."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, method: str, *arguments: Any) -> None:
        """Begin a call; `result` waits for it."""
        self._connection.send((method, arguments))

    def result(self, timeout_s: float = START_S) -> Any:
        """Result of the call that began. Raises RuntimeError with its error, or if there is no answer in time."""
        if not self._connection.poll(timeout_s):
            raise RuntimeError(f"a receiving process did not answer within {timeout_s:.0f} s")
        try:
            error, value = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"a receiving process ended with {self._process.exitcode}") from None
        if error is not None:
            raise RuntimeError(error)
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method and wait for it."""
        self.start(method, *arguments)
        return self.result()

    def kill(self) -> None:
        """Kill the process, as an out-of-memory killer would."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self.kill()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    made: Any = None
    while True:
        try:
            method, parameters = connection.recv()
        except EOFError:
            return
        try:
            made = made or make(*arguments)
            connection.send((None, getattr(made, method)(*parameters)))
        except Exception as error:  # noqa: BLE001 - it is raised again at the other end
            connection.send((f"{type(error).__name__}: {error}", None))


class Member:
    """Receiver of a weight group in another process."""

    def __init__(self, device: str, sync: dict[str, Any]) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._sync = SyncConfig.model_validate(sync)
        self._receiver: Receiver | None = None

    def ready(self) -> bool:
        """Return once the process has its device."""
        torch.zeros(1, device=self.device)
        return True

    def join(self, port: int, rank: int, world_size: int) -> None:
        """Join the group, leaving an earlier one."""
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = open_receiver(self._sync, HOST, port, rank, world_size, self.device)

    def received(self, manifest: SyncManifest) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one sync."""
        assert self._receiver is not None
        return self._receiver.receive(manifest)

    def sums(self, manifest: SyncManifest) -> list[bytes]:
        """Receive; a checksum of each tensor."""
        return [mixed_sum(tensor.reshape(-1).view(torch.uint8)) for _, tensor in self.received(manifest)]


class LiveTeacher(Member):
    """A live teacher on the receiving end."""

    def __init__(self, device: str, sync: dict[str, Any], folder: str) -> None:
        super().__init__(device, sync)
        from transformers import AutoModelForCausalLM

        from teacher_server.backends.hf.backend import TransformersBackend

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(self.device)
        self._backend = TransformersBackend(model, model_name=folder, kind="live")

    def load(self, manifest: SyncManifest) -> None:
        """Receive and load one version."""
        assert manifest.version is not None
        self._backend.load_weights(self.received(manifest), manifest.version)

    def score(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        """Log-probs of the responses."""
        from teacher_server.backends.base import Work
        from tests.gpu.checks.teacher import scores_of

        works = [Work(ScoreItem(None, s.prompt_ids, s.response_ids), None, "sampled", 1.0, 0) for s in sequences]
        return [scores_of([result])[0] for result in self._backend.score(works)]
