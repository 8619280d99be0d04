"""The experts that a mixture-of-experts student chooses for each token, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ROUTER = re.compile("(Router|Gate)$")
"""Names of transformers' router classes; each returns the ids of the experts among its outputs."""
LAYER = re.compile(r"\.layers\.(\d+)\.")


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """Return the routers of `model` by the number of their layer."""
    return {
        int(match[1]): module
        for name, module in model.named_modules()
        if ROUTER.search(type(module).__name__) and (match := LAYER.search(name))
    }


@contextmanager
def recorded_experts(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that a forward pass inside this scope fills with the chosen experts, ``[tokens, k]`` by layer."""
    chosen: dict[int, Tensor] = {}

    def record(layer: int, outputs: Any) -> None:
        (chosen[layer],) = (value.flatten(0, -2) for value in outputs if not value.is_floating_point())

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, outputs, layer=layer: record(layer, outputs))
        for layer, module in routers(model).items()
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()
