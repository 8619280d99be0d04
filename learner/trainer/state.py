"""A rank's resumable state on disk: DeepSpeed's own checkpoint, with counters and random number generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from learner.trainer.distributed import raise_on_all

_TAG = "state"


def save_state(deepspeed_engine: Any, folder: Path, counters: dict[str, int]) -> None:
    """Write this rank's part under `folder`; returns when all ranks have.

    Raises OSError, on every rank, where the disk did not take the part of one. The ranks can go on after it.
    """
    writing = _Writing(deepspeed_engine.checkpoint_engine)
    with writing.instead_of_own(deepspeed_engine):
        deepspeed_engine.save_checkpoint(
            str(folder),
            tag=_TAG,
            client_state={"counters": counters},
            save_latest=False,
            exclude_frozen_parameters=True,  # under LoRA they are those of the student's initial model
        )
    with writing.held():
        torch.save(_generators(), folder / _TAG / f"generators_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        shape = torch.tensor([dist.get_world_size(), deepspeed_engine.zero_optimization_stage()])
        with writing.held():
            torch.save(shape, folder / _TAG / "shape.pt")
    raise_on_all(writing.error, "the learner's state")


class _Writing:
    """DeepSpeed's writer of files, whose errors wait: raised between two of DeepSpeed's collectives, one would leave
    the other ranks in the second.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        self.error: Exception | None = None
        """The first one."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep what the disk does not take."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises the latter where the disk is full
            self.error = self.error or error

    @contextmanager
    def instead_of_own(self, deepspeed_engine: Any) -> Iterator[None]:
        """Let `deepspeed_engine` write through this one."""
        copy_script = deepspeed_engine._copy_recovery_script

        def copy(folder: str) -> None:
            with self.held():
                copy_script(folder)

        deepspeed_engine.checkpoint_engine = self
        deepspeed_engine._copy_recovery_script = copy
        try:
            yield
        finally:
            deepspeed_engine.checkpoint_engine = self._own
            del deepspeed_engine._copy_recovery_script

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.held():
            self._own.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        with self.held():
            self._own.save(state_dict, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def load_state(deepspeed_engine: Any, folder: Path) -> dict[str, int]:
    """Read this rank's part; the counters that were saved with it.

    Raises FileNotFoundError where there is none, ValueError where it was written by another world size or stage.
    """
    world_size, stage = torch.load(folder / _TAG / "shape.pt").tolist()
    here = (dist.get_world_size(), deepspeed_engine.zero_optimization_stage())
    if (world_size, stage) != here:
        raise ValueError(
            f"{folder} was saved by {world_size} ranks at ZeRO stage {stage}, this run has {here[0]} at "
            f"stage {here[1]}: resume with the same learner.ranks and learner.zero_stage"
        )
    # Frozen parameters are not stored; where there are none, a missing one is a damaged checkpoint.
    frozen = any(not parameter.requires_grad for parameter in deepspeed_engine.module.parameters())
    _, client = deepspeed_engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not frozen)
    _restore(torch.load(folder / _TAG / f"generators_{dist.get_rank()}.pt", weights_only=False))
    return dict(client["counters"])


def _generators() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
