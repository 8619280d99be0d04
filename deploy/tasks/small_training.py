"""Training of the narrow models that `opcd prepare` makes for a laptop's tasks: plain AdamW on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deploy.tasks.hidden_rule import Size

if TYPE_CHECKING:
    from torch import Tensor

LEARNING_RATE, WARMUP = 2e-3, 50
INITIAL_SCALE = 5.0
"""Of the first weights: the usual ones are for wide models, a narrow one takes far longer to begin with them."""


def fit(model: Any, size: Size, losses: Callable[[], Iterator[Tensor]]) -> Any:
    """Train `model` for all steps of `size` on the sum of what `losses` gives anew at each; it is returned."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(INITIAL_SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size.most_steps))
    for _ in size.steps():
        optimizer.zero_grad()
        for loss in losses():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: up over `WARMUP` steps, then down to nothing."""
    return min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1))
