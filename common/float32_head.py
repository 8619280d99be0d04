"""Output layers in float32 for weights of any dtype, without a float32 copy of the weight.

The logits of a bfloat16 product have 8 bits: up to 0.06 nats are lost at a logit of 20. Learner, teacher and engine
therefore all compute ``hidden @ weight.T + bias`` from the exact values of the stored operands, with sums in float32.
vLLM does the same with ``head_dtype: float32`` (`ENGINE_OVERRIDES`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ENGINE_OVERRIDES = {"head_dtype": "float32"}
"""vLLM's ``hf_overrides``: logits in float32. Without effect on a float32 model; vLLM refuses a quantised output layer.
"""

SLICE_BYTES = 32 * 1024 * 1024
"""Upper bound for the part of a weight that is in float32 at once, where the device has no mixed product."""


def float32_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``hidden [n, d] @ weight [V, d].T + bias [V]`` as float32 ``[n, V]``, without gradient for other dtypes.

    Products of two bfloat16 (or float16) numbers are exact in float32, so only the order of summation is left open.
    CUDA computes them without a copy; elsewhere `SLICE_BYTES` of the weight are converted at a time.
    """
    import torch

    hidden = hidden.to(weight.device)
    if hidden.dtype == weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden, weight, bias)
    with torch.no_grad():
        if hidden.is_cuda and hidden.dtype == weight.dtype:
            logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            hidden = hidden.float()
            logits = hidden.new_empty(len(hidden), len(weight))
            step = max(1, SLICE_BYTES // (4 * weight.shape[1]))
            for start in range(0, len(weight), step):
                logits[:, start : start + step] = hidden @ weight[start : start + step].float().t()
        return logits if bias is None else logits.add_(bias)


@contextmanager
def float32_forward(linear: Any) -> Iterator[None]:
    """Let a model's output layer return float32 logits inside this scope, for comparisons with `float32_linear`."""
    own = linear.__dict__.get("forward")  # accelerate sets one

    def forward(hidden: Tensor) -> Tensor:
        logits = float32_linear(hidden.flatten(0, -2), linear.weight, getattr(linear, "bias", None))
        return logits.unflatten(0, hidden.shape[:-1])

    linear.forward = forward
    try:
        yield
    finally:
        del linear.forward
        if own is not None:
            linear.forward = own
