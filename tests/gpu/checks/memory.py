"""Memory that training and scoring give back."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from teacher_server.backends.hf.backend import TransformersBackend
from tests.gpu.checks.teacher import context_ids
from tests.gpu.models import load, model_folder
from tests.gpu.place import SLACK_BYTES, Place, free_memory, gib
from tests.gpu.report import Figure
from tests.gpu.training import new_engine, scored_batch, train, training_config


def memory(place: Place) -> Iterator[Figure]:
    """A step leaves what the step before left; little is cached after giving back; contexts leave nothing."""
    folder = model_folder(place, place.sizes.trained)
    batch = scored_batch(place)
    engine = new_engine(training_config(place, folder, "bfloat16", zero_stage=2))
    held = []
    for _ in range(3):
        train(engine, batch, 1)
        held.append(place.allocated())
    yield gib("growth from step 2 to 3", held[2] - held[1], 1 << 20)
    free_memory()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if place.on_gpu else None
    yield gib("cached after giving back", cached, held[2] * 0.1 + SLACK_BYTES)
    del engine
    free_memory()

    model = load(model_folder(place, place.sizes.scored), place, torch.bfloat16)
    backend = TransformersBackend(model, model_name="bf16", prefill_tokens=place.sizes.prefill_tokens)
    base = place.allocated()
    for _ in range(2):
        (prefix,) = backend.prefill([context_ids(place)], None)
    yield gib("one context", place.allocated() - base, prefix.nbytes * 1.02 + SLACK_BYTES)
    del prefix
    yield gib("left by contexts", place.allocated() - base, SLACK_BYTES)
