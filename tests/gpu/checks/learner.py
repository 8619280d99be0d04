"""DeepSpeed in a world of one rank: stages and options against a plain float32 loop, memory, saving and loading."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from learner.trainer.optimizer import BUCKET_ELEMENTS
from tests.gpu.models import model_folder
from tests.gpu.place import SLACK_BYTES, Place, free_memory, gib
from tests.gpu.report import Figure
from tests.gpu.training import new_engine, plain_training, scored_batch, train, training_config


@dataclass(frozen=True)
class Variant:
    """Settings of the learner, and the bytes a parameter that they keep on the device between steps.

    In bfloat16: 2 for the weight, 4 for its float32 copy, 8 for two moments; stage 3 also keeps a float32 buffer for
    gradients. In float32 without ZeRO: weight, gradient and two moments.
    """

    name: str
    held_bytes: int
    options: dict[str, Any]
    dtype: str = "bfloat16"


VARIANTS = (
    Variant("fp32 stage 0", 16, {"zero_stage": 0, "packing": "off"}, "float32"),
    Variant("bf16 stage 2", 14, {"zero_stage": 2, "packing": "off"}),
    Variant("bf16 stage 2 packed checkpointing", 14, {"zero_stage": 2, "gradient_checkpointing": True}),
    Variant("bf16 stage 3 packed", 18, {"zero_stage": 3}),
    Variant("bf16 stage 2 offload", 2, {"zero_stage": 2, "cpu_offload": True}),
)
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.05)}
"""Allowed relative difference from the plain loop by dtype: of each step's loss, and of the first step's gradient norm.
AdamW's first updates are nearly the gradient's signs, so later gradients of two precisions differ; their losses hardly.
"""
DROP = 0.2
"""Allowed relative difference of the loss's drop from the first to the last step: a lost update is 1 / (steps - 1)."""
HELD_ALLOWANCE = 1.05
"""Allowed ratio of the memory held to the formula: torch rounds blocks up. DeepSpeed's bucket is added."""


def learner(place: Place) -> Iterator[Figure]:
    """Five steps of each variant against a plain loop; memory held and its peak."""
    folder = model_folder(place, place.sizes.trained)
    batch = scored_batch(place)
    steps = place.sizes.steps
    expected = plain_training(place, training_config(place, folder, "float32"), batch, steps)
    free_memory()
    yield Figure(f"plain loop: loss of step {steps}", expected[-1][0] / expected[0][0], "of step 1", at_most=0.95)
    for variant in VARIANTS:
        before = place.allocated()
        engine: Any = None
        curve: list[tuple[float, float]] = []

        def run(variant: Variant = variant) -> None:
            nonlocal engine, curve
            engine = new_engine(training_config(place, folder, variant.dtype, **variant.options))
            curve = train(engine, batch, steps)

        peak = place.peak_of(run)
        held = place.allocated() - before
        limit = engine.info().parameters * variant.held_bytes * HELD_ALLOWANCE + BUCKET_ELEMENTS * 4 + SLACK_BYTES
        engine = None
        free_memory()
        loss_limit, norm_limit = LIMITS[variant.dtype]
        yield Figure(f"{variant.name}: loss off by", relative(curve, expected, 0), at_most=loss_limit)
        yield Figure("gradient norm off by", relative(curve[:1], expected[:1], 1), at_most=norm_limit)
        drop = (curve[0][0] - curve[-1][0]) / (expected[0][0] - expected[-1][0])
        yield Figure("drop", drop, "of the plain loop's", at_least=1 - DROP, at_most=1 + DROP)
        yield gib("held", held, limit)
        yield gib("peak", peak)


def relative(curve: list[tuple[float, float]], expected: list[tuple[float, float]], column: int) -> float:
    """Largest relative difference over the steps."""
    return max(abs(got[column] / want[column] - 1) for got, want in zip(curve, expected, strict=True))


def resume(place: Place) -> Iterator[Figure]:
    """An engine that loads a saved state continues to the bit, in bfloat16 with deterministic algorithms."""
    folder = model_folder(place, place.sizes.trained)
    batch = scored_batch(place)
    config = training_config(place, folder, "bfloat16", zero_stage=2, deterministic=True)
    saved = place.folder / "state"
    engine = new_engine(config)
    train(engine, batch, 1)
    seconds = place.seconds_once(lambda: engine.save_state(saved))
    size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    train(engine, batch, 1)
    expected = {name: tensor.cpu().clone() for name, tensor in engine.named_weights()}
    del engine
    free_memory()
    engine = new_engine(config)
    loading = place.seconds_once(lambda: engine.load_state(saved))
    shutil.rmtree(saved)
    train(engine, batch, 1)
    different = sum(not torch.equal(tensor.cpu(), expected[name]) for name, tensor in engine.named_weights())
    yield Figure("tensors that differ after resuming", different, at_most=0)
    yield Figure("save", size / seconds / 1e9, "GB/s")
    yield Figure("load", size / loading / 1e9, "GB/s")
    torch.use_deterministic_algorithms(False)
