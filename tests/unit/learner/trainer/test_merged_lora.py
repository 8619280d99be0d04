"""LoRA layers that compute with the merged weight: value and gradients against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from common.config.model import LoraConfig
from learner.trainer.lora import adapters_of, add_adapters, without_adapters

IN, OUT, SCALE = 24, 16, 2.0


class Model(nn.Module):
    """One linear layer, as peft and `add_adapters` take it."""

    dtype = torch.bfloat16
    config = PreTrainedConfig()

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(IN, OUT, bias=bias).to(self.dtype)
        add_adapters(self, LoraConfig(rank=4, alpha=8, target_modules=("proj",)))
        layer: Any = self.proj
        self.a, self.b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            self.b.normal_(std=1e-3)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_are_those_of_the_merged_layer(bias: bool) -> None:
    model = Model(bias=bias)
    base = model.proj.base_layer
    x = torch.randn(2, 5, IN).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(2, 5, OUT).to(torch.bfloat16)
    weight = adapters_of(model)["proj.weight"].merged(base.weight)
    y = model.proj(x)
    assert torch.equal(y, nn.functional.linear(x, weight, base.bias))
    y.backward(upstream)

    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, model.a, model.b))
    exact = base.weight.double() + SCALE * b64 @ a64
    rounded = exact + (weight.double() - exact).detach()  # the gradient passes the rounding
    (x64 @ rounded.t()).backward(upstream.double())
    for got, expected in ((x.grad, x64.grad), (model.a.grad, a64.grad), (model.b.grad, b64.grad)):
        assert relative(got, expected) < 2**-7
    assert base.weight.grad is None
    with without_adapters(model):
        assert torch.equal(model.proj(x), base(x))


def test_rounding_loses_part_of_a_small_adapter() -> None:
    """The fault that merged layers are for: base plus adapter is another function than the published weight."""
    model = Model(bias=False)
    base, x = model.proj.base_layer, torch.randn(64, IN).to(torch.bfloat16)
    step = SCALE * (x.double() @ model.a.double().t() @ model.b.double().t())
    unmerged = x.double() @ base.weight.double().t() + step
    merged = x.double() @ adapters_of(model)["proj.weight"].merged(base.weight).double().t()
    assert relative(merged, unmerged) > 0.05 * float(step.norm() / unmerged.norm())
    assert relative(model.proj(x), merged) < 2**-8
