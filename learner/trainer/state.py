"""Resumable state of a rank on disk: DeepSpeed's checkpoint, counters, random number generators."""

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
    """Write this rank's part under `folder`; returns when all ranks have written theirs.

    Raises OSError on every rank if one rank cannot write its part; the ranks can continue afterwards.
    """
    writer = _DeferringWriter(deepspeed_engine.checkpoint_engine)
    with writer.installed_in(deepspeed_engine):
        deepspeed_engine.save_checkpoint(
            str(folder),
            tag=_TAG,
            client_state={"counters": counters},
            save_latest=False,
            exclude_frozen_parameters=True,  # under LoRA they equal the student's initial model
        )
    with writer.deferring():
        torch.save(_generators(), folder / _TAG / f"generators_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        shape = torch.tensor([dist.get_world_size(), deepspeed_engine.zero_optimization_stage()])
        with writer.deferring():
            torch.save(shape, folder / _TAG / "shape.pt")
    raise_on_all(writer.error, "the learner's state")


class _DeferringWriter:
    """Wraps DeepSpeed's file writer and keeps its first error for later.

    An error raised between two of DeepSpeed's collectives would leave the other ranks waiting in the second one.
    """

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.error: Exception | None = None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Keep a write error instead of raising it."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            self.error = self.error or error

    @contextmanager
    def installed_in(self, deepspeed_engine: Any) -> Iterator[None]:
        """Make `deepspeed_engine` write through this writer inside the scope."""
        copy_script = deepspeed_engine._copy_recovery_script

        def copy(folder: str) -> None:
            with self.deferring():
                copy_script(folder)

        deepspeed_engine.checkpoint_engine = self
        deepspeed_engine._copy_recovery_script = copy
        try:
            yield
        finally:
            deepspeed_engine.checkpoint_engine = self._wrapped
            del deepspeed_engine._copy_recovery_script

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self.deferring():
            self._wrapped.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        with self.deferring():
            self._wrapped.save(state_dict, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def load_state(deepspeed_engine: Any, folder: Path) -> dict[str, int]:
    """Read this rank's part; return the counters saved with it.

    Raises FileNotFoundError if there is none, ValueError if another world size or ZeRO stage wrote it.
    """
    world_size, stage = torch.load(folder / _TAG / "shape.pt").tolist()
    current = (dist.get_world_size(), deepspeed_engine.zero_optimization_stage())
    if (world_size, stage) != current:
        raise ValueError(
            f"{folder} was saved by {world_size} ranks at ZeRO stage {stage}, this run has {current[0]} at "
            f"stage {current[1]}: resume with the same learner.ranks and learner.zero_stage"
        )
    # Frozen parameters are not stored; without any, a missing parameter means a damaged checkpoint.
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
