"""Norm of the weight change of one AdamW step, computed from the optimiser's state without a copy of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 4_194_304
"""Elements per chunk: temporaries stay under 100 MB."""


def update_norm(deepspeed_engine: Any, stage: int, device: torch.device) -> float:
    """Return the norm of the change of the last step over all weights; above stage 0 a collective on `device`."""
    zero = deepspeed_engine.optimizer
    adam = getattr(zero, "optimizer", zero)
    # Stage 3 hands its partitions to the optimiser one by one and removes them afterwards.
    parts = zero.fp32_partitioned_groups_flat if stage == 3 else adam.param_groups[0]["params"]
    square = torch.tensor(_squared_update(adam, parts), dtype=torch.float64)
    if stage > 0:  # each rank holds a partition of the state
        square = square.to(device)
        dist.all_reduce(square)
    return float(square) ** 0.5


@torch.no_grad()
def _squared_update(optimizer: torch.optim.AdamW, parameters: Sequence[Tensor]) -> float:
    """Return the sum of squares of the last step's change to `parameters`, which share one group's settings.

    With ``u = m̂ / (√v̂ + ε)`` AdamW computes ``w' = (1 - lr λ) w - lr u``, so the change is
    ``-(lr λ w' + lr u) / (1 - lr λ)``: no difference of two close numbers.
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
        chunks = (
            tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
        )
        for weight, mean, square in zip(*chunks, strict=True):
            change = (mean / first).div_((square / second).sqrt_().add_(group["eps"])).mul_(group["lr"])
            change.add_(weight, alpha=decay).div_(1 - decay)
            total += float(change.norm()) ** 2
    return total
