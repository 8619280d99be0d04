"""Packed rows against padded ones: the kernel ran, the numbers agree, the speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from common.float32_head import float32_linear
from common.protocol.schema import TokenSequence
from learner.trainer.batch_layout import PACKED, PADDED, Layout
from learner.trainer.packing import pack
from tests.gpu.compat import adapt_torch
from tests.gpu.models import joined, load, model_folder, random_sequences, rms
from tests.gpu.place import Place, gib
from tests.gpu.report import Figure

TIMES_NOISE = 1.5
"""Allowed rms error against float32 in units of that of padded bfloat16 rows."""
CHUNK = 1024


@contextmanager
def counted_kernel() -> Iterator[list[int]]:
    """Count calls of torch's attention over packed sequences; sequences of the last call."""
    from torch.nn.attention import varlen

    wrapped: Callable[..., Any] = varlen.varlen_attn
    calls: list[int] = []

    def counting(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(len(borders) - 1)
        return wrapped(q, k, v, borders, *rest, **options)

    varlen.varlen_attn = counting  # type: ignore[assignment]
    try:
        yield calls
    finally:
        varlen.varlen_attn = wrapped


def packing(place: Place) -> Iterator[Figure]:
    """Switch a bfloat16 model to packed rows; compare log-probs, gradients and time with padded rows."""
    shape = place.sizes.scored
    folder = model_folder(place, shape)
    sequences = random_sequences(place, place.sizes.samples, shape.vocabulary)

    def run(layout: Layout) -> tuple[Tensor, Tensor]:
        return logprobs_and_gradient(model, layout, sequences)

    model = load(folder, place, torch.float32)
    exact = run(PADDED)
    model = load(folder, place, torch.bfloat16)
    padded = run(PADDED)
    padded_s = place.seconds(lambda: run(PADDED), 2)
    padded_peak = place.peak_of(lambda: run(PADDED))
    switch(model)
    with counted_kernel() as calls:
        packed = run(PACKED)
    layers = shape.layers if place.on_gpu else None
    yield Figure("kernel calls", len(calls), at_least=layers)
    yield Figure("sequences a call", max(calls, default=0), at_least=len(sequences) if place.on_gpu else None)
    for name, mine, theirs, truth in zip(("log-probs", "gradient"), packed, padded, exact, strict=True):
        noise = rms(theirs - truth)
        yield Figure(f"{name}: rms error", rms(mine - truth) / noise, "of padded bf16", at_most=TIMES_NOISE)
    packed_s = place.seconds(lambda: run(PACKED), 2)
    yield Figure("time", packed_s / padded_s, "of padded", at_most=1.0 if place.on_gpu else None)
    yield gib("padded peak", padded_peak)
    yield gib("packed peak", place.peak_of(lambda: run(PACKED)))


def switch(model: Any) -> None:
    """Switch `model` to packed rows; raises RuntimeError with the product's reason if it stays padded."""
    adapt_torch()
    reason = pack(model)
    if reason is not None:
        raise RuntimeError(f"the model was not packed: {reason}")


def logprobs_and_gradient(model: Any, layout: Layout, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Log-probs of all response tokens, and a gradient that has passed every layer's attention, in float64."""
    batch = layout.lay_out(sequences).to(model.device)
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight
    states = model.get_decoder()(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)[batch.positions]
    direction = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
    (gradient,) = torch.autograd.grad((states.float() * direction).sum(), weight)
    logprobs = torch.empty(len(states), device=states.device)
    for start in range(0, len(states), CHUNK):
        rows = slice(start, start + CHUNK)
        logits = float32_linear(states[rows].detach(), model.get_output_embeddings().weight)
        logprobs[rows] = logits.log_softmax(-1).gather(-1, batch.response_ids[rows, None])[:, 0]
    return joined([logprobs]), joined([gradient])
