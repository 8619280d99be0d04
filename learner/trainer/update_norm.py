"""How far one AdamW step moved the weights, read from the optimiser's state: no copy of the weights is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PIECE = 4_194_304
"""Elements looked at at a time: temporaries stay under 100 MB."""


@torch.no_grad()
def squared_update(optimizer: torch.optim.AdamW, parameters: Sequence[Tensor]) -> float:
    """Sum of squares of the change that the last step made to `parameters`, all of one group's settings.

    With ``u = m̂ / (√v̂ + ε)`` AdamW makes ``w' = (1 - lr λ) w - lr u``, so the change is
    ``-(lr λ w' + lr u) / (1 - lr λ)``, without the difference of two close numbers.
    """
    total = 0.0
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    decay = group["lr"] * group["weight_decay"]
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        if not state:
            continue
        step = float(state["step"])
        first, second = 1 - beta1**step, 1 - beta2**step
        parts = (tensor.reshape(-1).split(PIECE) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        for weight, mean, square in zip(*parts, strict=True):
            change = (mean / first).div_((square / second).sqrt_().add_(group["eps"])).mul_(group["lr"])
            change.add_(weight, alpha=decay).div_(1 - decay)
            total += float(change.norm()) ** 2
    return total
