"""The chunked output layer at the size of an 8B model: gradients, memory and time against whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from common.models.logits import LogitTransform
from learner.trainer.losses import topk_divergence
from learner.trainer.output_layer import ChunkView, OutputLayer
from tests.gpu.place import Place, free_memory, gib
from tests.gpu.report import Figure

CHUNK_BUFFERS = 3
"""Float32 buffers of [chunk, vocabulary] that may be alive at once: logits, their gradient, copies in bfloat16."""
TIMES_NOISE = 2.0
"""Allowed gradient error in units of that of whole bfloat16 logits under autograd."""


class Problem:
    """Hidden states, a head and a teacher of random values; `naive` and `chunked` compute loss and gradients."""

    def __init__(self, place: Place, tokens: int, dtype: torch.dtype) -> None:
        sizes, device = place.sizes, place.device
        generator = torch.Generator(device).manual_seed(0)
        width, vocabulary, k = sizes.head_hidden, sizes.head_vocabulary, sizes.k
        self.hidden = torch.randn(tokens, width, device=device, generator=generator).to(dtype).requires_grad_()
        weight = 4 / width**0.5 * torch.randn(vocabulary, width, device=device, generator=generator)
        self.linear = torch.nn.Linear(width, vocabulary, bias=False, device="meta")
        self.linear.weight = torch.nn.Parameter(weight.to(dtype))
        first = torch.randint(vocabulary, (tokens, 1), device=device, generator=generator)
        self.ids = (first + torch.arange(k, device=device)) % vocabulary
        teacher = torch.randn(tokens, k + 1, device=device, generator=generator).log_softmax(-1)
        self.teacher, self.teacher_tail = teacher[:, :k].contiguous(), teacher[:, k].contiguous()

    def loss(self, view: ChunkView) -> Tensor:
        """The product's divergence, summed."""
        return topk_divergence(
            view.logprobs,
            self.teacher[view.rows],
            form="tail",
            direction="reverse",
            student_tail=view.tail,
            teacher_tail=self.teacher_tail[view.rows],
        ).sum()

    def chunked(self, chunk: int) -> Tensor:
        """The product's layer."""
        self.clear()
        layer = OutputLayer(self.linear, LogitTransform(), chunk)
        value = layer(self.hidden, self.ids, self.ids[:, 0], loss=self.loss)
        value.backward()
        return value.detach()

    def naive(self) -> Tensor:
        """Whole logits and autograd; log-probs in float32, or float64 for float64 inputs."""
        self.clear()
        logits = torch.nn.functional.linear(self.hidden, self.linear.weight)
        logprobs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        at_ids = logprobs.gather(-1, self.ids)
        tail = logprobs.scatter(-1, self.ids, float("-inf")).logsumexp(-1)
        value = self.loss(ChunkView(slice(None), at_ids, tail, at_ids[:, 0]))
        value.backward()
        return value.detach()

    def clear(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.linear.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of hidden states and weight."""
        assert self.hidden.grad is not None
        assert self.linear.weight.grad is not None
        return self.hidden.grad, self.linear.weight.grad


def head(place: Place) -> Iterator[Figure]:
    """Gradients against float64 on a few tokens; then peak memory against the formula, and time, by chunk."""
    sizes = place.sizes
    small = Problem(place, sizes.head_oracle_tokens, torch.bfloat16)
    small.chunked(sizes.head_chunks[0])
    got = [gradient.clone() for gradient in small.gradients()]
    small.naive()
    noisy = [gradient.clone() for gradient in small.gradients()]
    small.hidden = small.hidden.detach().double().requires_grad_()
    small.linear.weight = torch.nn.Parameter(small.linear.weight.detach().double())
    small.naive()
    for name, mine, theirs, exact in zip(("hidden", "weight"), got, noisy, small.gradients(), strict=True):
        ratio = distance(mine, exact) / distance(theirs, exact)
        yield Figure(f"{name} gradient error", ratio, "of whole bf16 logits", at_most=TIMES_NOISE)
    del small, got, noisy, mine, theirs, exact
    free_memory()

    problem = Problem(place, sizes.head_tokens, torch.bfloat16)
    rows, width, vocabulary = sizes.head_tokens, sizes.head_hidden, sizes.head_vocabulary
    # The weight's gradient in float32, a bfloat16 product to add to it, and the bfloat16 gradient that is returned.
    gradients = vocabulary * width * (4 + 2 + 2) + rows * width * 2 * 2
    for chunk in sizes.head_chunks:
        seconds = place.seconds(partial(problem.chunked, chunk))
        problem.clear()
        peak = place.peak_of(partial(problem.chunked, chunk))
        yield gib(f"chunk {chunk}: peak", peak, gradients + CHUNK_BUFFERS * chunk * vocabulary * 4)
        yield Figure("time", seconds, "s")
    problem.clear()
    free_memory()
    try:
        peak = place.peak_of(problem.naive)
        yield gib("whole logits: peak", peak)
        yield Figure("time", place.seconds(problem.naive), "s")
    except torch.OutOfMemoryError:
        yield Figure("whole logits: out of memory, peak above", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def distance(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact value."""
    return ((value.double() - exact).norm() / exact.norm()).item()
