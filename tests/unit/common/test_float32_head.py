"""Output layers in float32 of bfloat16 weights, against float64 products of the stored values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import float32_head
from common.float32_head import float32_forward, float32_linear
from common.models.logits import LogitTransform
from teacher_server.backends.hf.outputs import score_hidden

N, V, D = 9, 501, 64
SLICE_BYTES = 20_000


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest float32 tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def head(dtype: torch.dtype, *, bias: bool = False) -> tuple[Tensor, Any]:
    torch.manual_seed(0)
    linear = nn.Linear(D, V, bias=bias)
    return (torch.randn(N, D) * 4).to(dtype), linear.to(dtype)


def exact(hidden: Tensor, linear: Any) -> Tensor:
    bias = None if linear.bias is None else linear.bias.double()
    return nn.functional.linear(hidden.double(), linear.weight.double(), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_the_product_of_the_stored_values(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_head, "SLICE_BYTES", SLICE_BYTES)
    hidden, linear = head(dtype, bias=bias)
    got = float32_linear(hidden, linear.weight, linear.bias)
    assert got.dtype == torch.float32
    assert (got - exact(hidden, linear)).abs().max() < 1e-5
    if dtype != torch.float32:
        assert (linear(hidden) - exact(hidden, linear)).abs().max() > 1e-3  # the model's own product is rounded


def test_no_float32_copy_of_a_bfloat16_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_head, "SLICE_BYTES", SLICE_BYTES)
    hidden, linear = head(torch.bfloat16)
    with LargestTensor() as largest:
        float32_linear(hidden, linear.weight)
    assert max(N * V, SLICE_BYTES // 4) >= largest.elements > 0


def test_a_model_returns_float32_logits_inside_the_scope_only() -> None:
    hidden, linear = head(torch.bfloat16, bias=True)
    batched = hidden.unflatten(0, (3, 3))
    with float32_forward(linear):
        assert torch.equal(linear(batched).flatten(0, 1), float32_linear(hidden, linear.weight, linear.bias))
    assert linear(hidden).dtype == torch.bfloat16
    assert "forward" not in vars(linear)


def test_a_bfloat16_teacher_scores_from_float32_logits() -> None:
    hidden, linear = head(torch.bfloat16)
    sampled = torch.arange(N)
    with torch.no_grad():
        scores = score_hidden(
            hidden, linear, LogitTransform(), V, sampled=sampled, ids=None, mode="sampled", temperature=1.0, k=0
        )
    expected = exact(hidden, linear).log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
    assert (scores.sampled - expected).abs().max() < 1e-5
