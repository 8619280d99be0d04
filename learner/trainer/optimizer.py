"""The optimiser, and the DeepSpeed configuration around it.

Gradients accumulate as sums, because the step's denominator is known only at its end. DeepSpeed's ZeRO optimisers
divide by ``loss_scale`` before they clip; `BoundaryAdamW` does the same without ZeRO, so the engine sets one field at
every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from common.config.model import LearnerConfig
from common.config.training import decay_steps
from common.sizing.memory import BUCKET_ELEMENTS


class BoundaryAdamW(torch.optim.AdamW):
    """AdamW for gradient sums: divides by `loss_scale`, measures the norm, clips, and skips non-finite gradients.

    Field names are those of DeepSpeed's engine and its ZeRO optimisers.
    """

    def __init__(self, params: Iterable[Tensor], *, clip_grad: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.clip_grad = clip_grad
        self.loss_scale = 1.0
        self.overflow = False
        self._global_grad_norm = 0.0

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters; on a NaN or infinite gradient set `overflow` and change nothing."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() / self.loss_scale
        self._global_grad_norm = norm
        self.overflow = not torch.isfinite(torch.tensor(norm)).item()
        if self.overflow:
            return None
        factor = min(1.0, self.clip_grad / (norm + 1e-6)) / self.loss_scale
        torch._foreach_mul_(gradients, factor)
        return super().step(closure)


def make_optimizer(parameters: Sequence[Tensor], learner: LearnerConfig, zero_stage: int) -> torch.optim.AdamW:
    """Create torch's AdamW over `parameters` in one group, as in the paper."""
    options: dict[str, Any] = {
        "lr": learner.lr,
        "betas": learner.betas,
        "eps": learner.eps,
        "weight_decay": learner.weight_decay,
        "fused": True,  # one pass over the state: no temporary the size of the model
    }
    if zero_stage == 0:
        return BoundaryAdamW(parameters, clip_grad=learner.grad_clip, **options)
    return torch.optim.AdamW(parameters, **options)


def learning_rate(update: int, learner: LearnerConfig) -> float:
    """Return the learning rate of update number `update`, counted from 0 without skipped steps.

    A function of the count alone, so a resumed run continues the schedule. The warm-up is linear from lr / warmup_steps
    to lr. A decay ends at `min_lr` after ``learner.steps`` updates and stays there.
    """
    if update < learner.warmup_steps:
        return learner.lr * (update + 1) / learner.warmup_steps
    decay = decay_steps(learner)
    into_decay = update - (learner.steps - decay)
    if not decay or into_decay <= 0:
        return learner.lr
    progress = min(into_decay / decay, 1.0)
    left = 1 - progress if learner.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return learner.min_lr + (learner.lr - learner.min_lr) * left


def effective_zero_stage(stage: int, dtype: torch.dtype) -> int:
    """Raise the stage to at least 2 for bfloat16: only from there DeepSpeed keeps float32 gradient sums.

    The stage decides where state lies, not what is computed.
    """
    return max(stage, 2) if dtype == torch.bfloat16 else stage


def deepspeed_config(learner: LearnerConfig, zero_stage: int, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """Build the configuration for `deepspeed.initialize`."""
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        # The number of micro-batches varies; the call to step() is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if zero_stage == 0 else learner.grad_clip,
        "zero_optimization": {
            "stage": zero_stage,
            # DeepSpeed refuses it below stage 2 if the caller sets the boundary.
            "overlap_comm": zero_stage >= 2 and world_size > 1,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
        "steps_per_print": None,
    }
    if learner.cpu_offload:
        tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        # DeepSpeed's CPU Adam is compiled at start; torch's fused AdamW is as exact and needs no compiler.
        tree["zero_force_ds_cpu_optimizer"] = False
    if dtype == torch.bfloat16:
        tree["bf16"] = {"enabled": True, "check_grad_overflow": True}
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree
