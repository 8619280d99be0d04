"""DeepSpeed in a world of one rank: stages and options against a plain float32 loop, memory, saving and loading."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch

from common.config.model import Config
from common.sizing.memory import BUCKET_ELEMENTS, rank_need
from common.sizing.model_size import read_model_size
from tests.gpu.models import model_folder
from tests.gpu.place import SLACK_BYTES, Place, free_memory, gib
from tests.gpu.report import Figure
from tests.gpu.training import new_engine, plain_training, scored_batch, train, training_config

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32 stage 0": {"dtype": "float32", "zero_stage": 0, "packing": "off"},
    "bf16 stage 2": {"zero_stage": 2, "packing": "off"},
    "bf16 stage 2 packed checkpointing": {"zero_stage": 2, "gradient_checkpointing": True},
    "bf16 stage 3 packed": {"zero_stage": 3},
    "bf16 stage 2 offload": {"zero_stage": 2, "cpu_offload": True},
}
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.05)}
"""Allowed relative difference from the plain loop by dtype: of each step's loss, and of the first step's gradient norm.
AdamW's first updates are nearly the gradient's signs, so later gradients of two precisions differ; their losses hardly.
"""
DROP = 0.2
"""Allowed relative difference of the loss's drop from the first to the last step: a lost update is 1 / (steps - 1)."""
MEMORY = 1.05
"""Allowed ratio of memory to the sizing table's: torch rounds blocks up."""


def learner(place: Place) -> Iterator[Figure]:
    """Five steps of each variant against a plain loop; memory held and its peak."""
    folder = model_folder(place, place.sizes.trained)
    batch = scored_batch(place)
    steps = place.sizes.steps
    expected = plain_training(place, training_config(place, folder, "float32"), batch, steps)
    free_memory()
    yield Figure(f"plain loop: loss of step {steps}", expected[-1][0] / expected[0][0], "of step 1", at_most=0.95)
    size = read_model_size(str(folder))
    assert size is not None
    for name, options in VARIANTS.items():
        config = training_config(place, folder, **{"dtype": "bfloat16", **options})
        need = rank_need(config, size, longest=place.sizes.prompt_tokens + place.sizes.response_tokens)
        before = place.allocated()
        engine: Any = None
        curve: list[tuple[float, float]] = []

        def run(config: Config = config) -> None:
            nonlocal engine, curve
            engine = new_engine(config)
            curve = train(engine, batch, steps)

        peak = place.peak_of(run)
        held = place.allocated() - before
        engine = None
        free_memory()
        loss_limit, norm_limit = LIMITS[config.student.dtype]
        yield Figure(f"{name}: loss off by", relative(curve, expected, 0), at_most=loss_limit)
        yield Figure("gradient norm off by", relative(curve[:1], expected[:1], 1), at_most=norm_limit)
        drop = (curve[0][0] - curve[-1][0]) / (expected[0][0] - expected[-1][0])
        yield Figure("drop", drop, "of the plain loop's", at_least=1 - DROP, at_most=1 + DROP)
        # On CPU the offloaded state is on the same device, and DeepSpeed's bucket is larger than the model.
        held_limit = MEMORY * (need.certain + BUCKET_ELEMENTS * 4) + SLACK_BYTES if place.on_gpu else None
        yield gib("held", held, held_limit)
        yield gib("peak", peak, MEMORY * need.total + SLACK_BYTES)


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
