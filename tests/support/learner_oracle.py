"""One optimiser step written out with plain transformers and autograd, no chunks, no micro-batches, no ranks.

The optimiser is AdamW made smooth: with betas (0, 0) and ``eps`` 1 the update is ``lr * g / (|g| + 1)``, so that equal
gradients give equal weights, and nearly equal ones nearly equal weights (at the usual eps Adam's first step is the
sign of the gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.model import Config
from common.models.families import load_language_model
from common.protocol.schema import ScoredTrajectory
from learner.trainer.losses import limit_per_token, topk_divergence

SMOOTH: dict[str, Any] = {"lr": 100.0, "eps": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.0, "grad_clip": 1e9}
"""Keys of the `learner` section."""


def expected_gradients(
    config: Config, scored: Sequence[ScoredTrajectory], *, shift: int = 0, pad_to: int = 0
) -> dict[str, Tensor]:
    """Gradient of the step's loss by parameter name. `shift` moves the predicting position: 0 is right.

    Sequences are padded on the right to `pad_to` tokens, which changes nothing but the longest position of the pass.
    """
    model = load_language_model(config.student.model, attn_implementation="eager")
    loss, total, count = config.loss, torch.zeros(()), 0.0
    assert loss.form != "policy_gradient"
    for item in scored:
        prompt, response = item.trajectory.prompt.student_ids, item.trajectory.response_ids
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        ids = torch.nn.functional.pad(ids, (0, max(0, pad_to - ids.shape[1])))
        first = len(prompt) - 1 + shift
        logits = model(ids).logits[0, first : first + len(response)] / loss.temperature
        logprobs = logits.log_softmax(-1)
        support = torch.from_numpy(item.trajectory.topk_ids.astype("int64"))[: len(logits)]
        values = topk_divergence(
            logprobs.gather(-1, support),
            torch.from_numpy(item.score.logprobs.astype("float32"))[: len(logits)],
            form=loss.form,
            direction=loss.direction,
            beta=loss.beta,
            student_tail=logprobs.scatter(-1, support, -torch.inf).logsumexp(-1),
            teacher_tail=torch.from_numpy(item.score.tail_logprob)[: len(logits)],
            clip_per_entry=loss.clip_per_entry,
        )
        counted = limit_per_token(values, loss.clip_per_token)[loss.skip_first_tokens :]
        if loss.normalize == "token":
            total, count = total + counted.sum(), count + len(counted)
        elif len(counted):
            total, count = total + counted.mean(), count + 1
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def expected_change(config: Config, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change of the weights in one step of the smooth optimiser, after clipping."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    factor = (config.learner.grad_clip / (norm + 1e-6)).clamp(max=1.0)
    return {name: -config.learner.lr * g * factor / ((g * factor).abs() + 1.0) for name, g in gradients.items()}


def weights_of(folder: str | Path) -> dict[str, Tensor]:
    """A checkpoint's parameters."""
    return {n: p.detach() for n, p in load_language_model(str(folder)).named_parameters()}


def relative_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of two sets of tensors over the norm of `expected`; the names must be equal."""
    assert got.keys() == expected.keys()
    difference = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5
