"""Disk space of a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.config.model import Config
from common.sizing.memory import FLOAT32, element_bytes, zero_stage
from common.sizing.model_size import ModelSize

OTHER_BYTES = 256 * 1024**2
"""Metrics, samples, traces, report."""


def disk_needs(config: Config, student: ModelSize) -> dict[str, int]:
    """Bytes that the run's folder holds at its fullest, by part."""
    element = element_bytes(config.student.dtype, config.learner.gpus_per_rank)
    lora, settings = config.learner.lora, config.checkpoint
    export = element * (student.trained(lora) if lora is not None and lora.publish == "adapter" else student.parameters)
    steps = config.learner.steps
    periodic = {step for step in settings.export_at if step <= steps}
    if settings.export_every:
        periodic |= set(range(settings.export_every, steps + 1, settings.export_every))
    best = 1 if config.eval.every and config.data.valid is not None else 0
    found = {
        # The new one is written next to those that are kept.
        "checkpoints": (settings.keep + 1) * state_bytes(config, student) if settings.every != 0 else 0,
        "exports": (len(periodic) + best + 2) * export,
        "weights/": 2 * element * student.parameters if config.sync.backend == "file" and not config.sync.folder else 0,
        "other files": OTHER_BYTES,
    }
    return {name: size for name, size in found.items() if size}


def state_bytes(config: Config, student: ModelSize) -> int:
    """One resumable checkpoint: two moments, with ZeRO float32 weights, and below stage 3 the model's own weights."""
    element = element_bytes(config.student.dtype, config.learner.gpus_per_rank)
    stage = zero_stage(config.learner, element)
    own, master = element if stage < 3 else 0, FLOAT32 if stage > 0 else 0
    return student.trained(config.learner.lora) * (own + master + 2 * FLOAT32)


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path`, which need not exist yet."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def folder_bytes(path: Path) -> int:
    """Bytes of all files under `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
