"""LoRA layers that compute with the merged weight, rounded to the model's dtype, as engines do.

In bfloat16 most of a small ``s B A`` is lost when it is added to ``W``: the merged weights are another policy than base
plus adapter. Engines sample from the merged one, so the learner trains that one: its forward pass uses
``W' = round(W + s B A)``, bit-equal to the published weight. Gradients pass the rounding unchanged, as they do between
float32 master weights and bfloat16 weights: with y = W' x,

    dx = W'ᵀ dy      dB = s dy (A x)ᵀ      dA = s (Bᵀ dy) xᵀ.

W' is computed anew in every pass, in forward and backward; it costs the memory of one layer, and about as much time as
rank + 6 more tokens in the micro-batch would.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


@torch.no_grad()
def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``weight [out, in] + scale * b [out, rank] a [rank, in]``, summed in float32, in the dtype of `weight`."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(weight.dtype)


class MergedLinear(Linear):
    """Replaces peft's LoRA layer; names and parameters are the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the merged layer, or of the base layer while adapters are disabled."""
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        (name,) = self.active_adapters
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return _MergedProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name])


class _MergedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return nn.functional.linear(x, merge(weight, a, b, scale), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        x, weight, a, b = ctx.saved_tensors
        dx = upstream[0] @ merge(weight, a, b, ctx.scale) if ctx.needs_input_grad[0] else None
        dy, flat = upstream[0].flatten(0, -2), x.flatten(0, -2)
        da = ctx.scale * ((dy @ b.to(dy.dtype)).t() @ flat)
        db = ctx.scale * (dy.t() @ (flat @ a.to(flat.dtype).t()))
        return dx, None, None, da.to(a.dtype), db.to(b.dtype), None


def gather_together(model: nn.Module) -> None:
    """Have ZeRO-3 gather a layer's base weight with its factors; call it before ``deepspeed.initialize``."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    import deepspeed

    for layer in model.modules():
        if isinstance(layer, MergedLinear):
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)
