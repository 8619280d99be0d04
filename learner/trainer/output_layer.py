"""The output layer, computed chunk by chunk: no tensor of [tokens, vocabulary] ever exists.

The forward pass also computes the gradients of hidden states and head weight, from the one chunk of logits that exists
at the time. Like fused linear losses it keeps no logits for the backward pass, and recomputes none there.

With z the logits of one position, ``Z = Σ_j e^{z_j}`` and ``R = Σ_{j∉S} e^{z_j}``, the loss sees only

    log p_i = z_i - log Z (i ∈ S)      log tail = log R - log Z      log p_y (the sampled token)

and its gradients g_i, g_tail, g_y give, with G = Σ g_i + g_tail + g_y,

    dz_j = [j∈S] g_j + [j=y] g_y + [j∉S] g_tail e^{z_j}/R - G e^{z_j}/Z.

R is summed over the entries outside S, never computed as Z minus the others, so it is exact down to the smallest float.

Logits, and everything up to dz, are float32 for weights of any dtype (`common.float32_head`). With bfloat16 weights, dz
is rounded to bfloat16 for the two products of the backward pass; chunks of the weight's gradient are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.float32_head import float32_linear
from common.models.logits import LogitTransform
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID

Ids = Int[Tensor, "T k"]


@dataclass(frozen=True, slots=True)
class ChunkView:
    """Input of the loss for one chunk of c positions; `rows` are their indices among all T of the micro-batch.

    ``logprobs [c, k]`` at the support's ids (floor in padded columns), ``tail [c]`` and ``sampled [c]`` are float32, at
    the loss's temperature, and differentiable.
    """

    rows: slice
    logprobs: Float[Tensor, "c k"]
    tail: Float[Tensor, " c"]
    sampled: Float[Tensor, " c"]


ChunkLoss = Callable[[ChunkView], Tensor]
"""Maps one chunk to the scalar to minimise: a sum over its tokens, weights included."""


class OutputLayer(nn.Module):
    """The head, which shares its parameters with the model's output embedding.

    They are registered as parameters of this module, so that ZeRO-3 gathers them when it runs, forward and backward.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    adds_gradient: bool = False
    """If True, the backward pass adds the weight's gradient to ``weight.grad`` at once. Autograd would keep a tied
    weight's gradient, a tensor of [vocabulary, d], until the embedding's gradient exists, at the end of the pass. Leave
    it False under ZeRO, whose hooks only see gradients that autograd adds."""

    def __init__(self, linear: Any, transform: LogitTransform, chunk_tokens: int) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = getattr(linear, "bias", None)
        self.transform = transform
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        hidden: Float[Tensor, "T d"],
        ids: Ids | None = None,
        sampled: Int[Tensor, " T"] | None = None,
        *,
        temperature: float = 1.0,
        loss: ChunkLoss | None = None,
        read: Callable[[slice, Tensor], None] | None = None,
    ) -> Tensor:
        """Run over the chunks, with either `loss` or `read`.

        With `loss`, return the sum of its values, a scalar whose backward pass returns the gradients computed here.
        With `read`, call it with each chunk's rows and float32 logits ``[c, V]`` (at the temperature), without
        gradients, and return an empty tensor.
        """
        if read is not None:
            with torch.no_grad():
                for rows in _chunks(len(hidden), self.chunk_tokens):
                    read(rows, self._logits(hidden[rows], self.weight, self.bias, temperature))
            return hidden.new_empty(0)
        assert ids is not None
        assert sampled is not None
        assert loss is not None
        return _ChunkedLoss.apply(hidden, self.weight, self.bias, ids, sampled, self, temperature, loss)

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
        logits = self.transform(float32_linear(hidden, weight, bias))
        return logits if temperature == 1.0 else logits.div_(temperature)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        sampled: Tensor,
        layer: OutputLayer,
        temperature: float,
        loss: ChunkLoss,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grads = _Gradients(
            torch.zeros_like(hidden) if wants_hidden else None,
            # Chunks are summed in float32, whatever the weight's dtype.
            torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None,
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(hidden), layer.chunk_tokens):
            logits = layer._logits(hidden[rows], weight, bias, temperature)
            value, dlogits = _chunk_gradient(logits, ids[rows], sampled[rows], rows, loss, layer.transform, temperature)
            total += value
            grads.add(rows, dlogits.to(weight.dtype), hidden[rows], weight)
        ctx.layer = layer
        ctx.grads = (
            grads.hidden,
            None if grads.weight is None else grads.weight.to(weight.dtype),
            None if grads.bias is None or bias is None else grads.bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError("the chunked output layer was back-propagated twice; its gradients are handed out once")
        grads, ctx.grads = ctx.grads, None
        hidden, weight, bias = (None if grad is None else grad.mul_(upstream[0].to(grad.dtype)) for grad in grads)
        if weight is not None and ctx.layer.adds_gradient:
            parameter = ctx.layer.weight
            parameter.grad = weight if parameter.grad is None else parameter.grad.add_(weight)
            weight = None
        return hidden, weight, bias, None, None, None, None, None


@dataclass
class _Gradients:
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, rows: slice, dlogits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(dlogits, weight, out=self.hidden[rows])
        if self.weight is not None:
            if self.weight.dtype == dlogits.dtype:
                self.weight.addmm_(dlogits.t(), hidden)
            else:
                self.weight += dlogits.t() @ hidden
        if self.bias is not None:
            self.bias += dlogits.sum(dim=0, dtype=torch.float32)


def _chunk_gradient(
    logits: Float[Tensor, "c V"],
    ids: Int[Tensor, "c k"],
    sampled: Int[Tensor, " c"],
    rows: slice,
    loss: ChunkLoss,
    transform: LogitTransform,
    temperature: float,
) -> tuple[Tensor, Float[Tensor, "c V"]]:
    """Compute the loss of one chunk and its gradient for the output layer's raw product. Overwrites `logits`."""
    valid = ids != PAD_ID
    # A padded column repeats its row's first id: writing zero there twice is harmless, and it adds no gradient.
    ids = torch.where(valid, ids, ids[:, :1])
    sampled = sampled.unsqueeze(-1)
    slope = None if transform.softcap is None else _softcap_slope(logits, transform.softcap, temperature)
    highest = logits.amax(dim=-1, keepdim=True)
    at_ids = logits.gather(-1, ids) - highest
    at_sampled = logits.gather(-1, sampled) - highest

    exponentials = logits.sub_(highest).exp_()  # in place: the chunk's only [c, V] buffer
    total = exponentials.sum(dim=-1, keepdim=True)
    # The support is zeroed, not subtracted, so the rest is summed over the entries outside it.
    exponentials.scatter_(-1, ids, 0.0)
    rest = exponentials.sum(dim=-1, keepdim=True)

    log_total = total.log()
    view = ChunkView(
        rows,
        torch.where(valid, at_ids - log_total, LOGPROB_FLOOR),
        torch.where(rest > 0, rest.log() - log_total, LOGPROB_FLOOR).squeeze(-1),
        (at_sampled - log_total).squeeze(-1),
    )
    value, (g_ids, g_tail, g_sampled) = _evaluate(loss, view)
    g_ids = torch.where(valid, g_ids, 0.0)
    everything = g_ids.sum(dim=-1, keepdim=True) + g_tail + g_sampled

    per_rest = torch.where(rest > 0, g_tail / rest.clamp(min=torch.finfo(rest.dtype).tiny), 0.0)
    gradient = exponentials.mul_(per_rest - everything / total)
    inside = torch.where(valid, g_ids - everything * (at_ids - log_total).exp(), 0.0)
    gradient.scatter_add_(-1, ids, inside)
    gradient.scatter_add_(-1, sampled, g_sampled)
    if slope is not None:
        gradient.mul_(slope)
    factor = transform.scale / temperature
    return value, gradient if factor == 1.0 else gradient.mul_(factor)


def _evaluate(loss: ChunkLoss, view: ChunkView) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Compute the loss on one chunk, and its gradients ``[c, k]``, ``[c, 1]``, ``[c, 1]``."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (view.logprobs, view.tail, view.sampled)]
        value = loss(ChunkView(view.rows, *inputs))
        grads = torch.autograd.grad(value, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
    return value.detach(), (filled[0], filled[1].unsqueeze(-1), filled[2].unsqueeze(-1))


def _softcap_slope(logits: Tensor, softcap: float, temperature: float) -> Tensor:
    """Compute d capped / d raw = 1 - tanh² from the capped logits (at the temperature)."""
    return logits.mul(temperature / softcap).square_().neg_().add_(1.0)


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))
