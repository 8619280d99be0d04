"""The per-token divergence between student and teacher on a subset of the vocabulary. Pure torch.

Notation: at one response position, p is the student, q the teacher, S the support (k ids); P and Q are the masses of
S under p and q. All inputs are log-probabilities, normalised over the *full* vocabulary and then gathered at S. Only
the student's values carry a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from common.protocol.schema import LOGPROB_FLOOR

Form = Literal["tail", "raw", "renorm", "generalized", "exact"]
Direction = Literal["reverse", "forward", "jsd"]

LogProbs = Float[Tensor, "T k"]
PerToken = Float[Tensor, " T"]


def topk_divergence(
    student_logprobs: LogProbs,
    teacher_logprobs: LogProbs,
    *,
    form: Form,
    direction: Direction = "reverse",
    beta: float = 0.5,
    student_tail: PerToken | None = None,
    teacher_tail: PerToken | None = None,
    clip_per_entry: float | None = None,
) -> PerToken:
    """Compute the divergence at every response position, ``[T]``, in nats; differentiable in the student's values only.

    Args:
        student_logprobs: log p at the support's ids, ``[T, k]``.
        teacher_logprobs: log q at the same ids, ``[T, k]``.
        form: treatment of the mass outside S. `tail`: one more bucket (a lower bound of the full divergence, with zero
            gradient at p = q). `raw`: ignored (the paper's form; the gradient at p = q is not zero). `renorm`: both
            sides are renormalised on S. `generalized`: ignored, with the ``- p + q`` that makes every term
            non-negative. `exact`: S is the whole vocabulary, so nothing is outside.
        direction: `reverse` KL(p‖q), `forward` KL(q‖p), `jsd` ``β KL(q‖m) + (1-β) KL(p‖m)`` with ``m = βq + (1-β)p``.
        beta: weight of the teacher in m, between 0 and 1.
        student_tail: log (1 - P), ``[T]``; used by `tail` only, and computed from the given values if None.
        teacher_tail: log (1 - Q), ``[T]``, likewise.
        clip_per_entry: upper bound, in nats, for the term of one id (of the tail's bucket too) before the sum; an entry
            above it has no gradient.

    ``-inf``, `LOGPROB_FLOOR` and padded columns (floor on both sides) count as zero mass, in value and gradient. An id
    that the teacher cannot emit costs ``p * (log p - LOGPROB_FLOOR)``: large, but finite.

    Raises ValueError for shapes that do not fit, an unknown form or direction, or β outside (0, 1).
    """
    _check(student_logprobs, teacher_logprobs, student_tail, teacher_tail, direction, beta)
    student = _floored(student_logprobs.float())
    teacher = _floored(teacher_logprobs.detach().float())
    if form == "tail":
        outside_student = _log_rest(student) if student_tail is None else _floored(student_tail.float())
        outside_teacher = _log_rest(teacher) if teacher_tail is None else _floored(teacher_tail.detach().float())
        student = torch.cat([student, outside_student.unsqueeze(-1)], dim=-1)
        teacher = torch.cat([teacher, outside_teacher.unsqueeze(-1)], dim=-1)
    elif form == "renorm":
        student = student - student.logsumexp(dim=-1, keepdim=True)
        teacher = teacher - teacher.logsumexp(dim=-1, keepdim=True)
    elif form not in ("raw", "generalized", "exact"):
        raise ValueError(f"unknown form {form!r}; known: tail, raw, renorm, generalized, exact")
    terms = pointwise_divergence(student, teacher, direction, beta)
    value = (terms if clip_per_entry is None else terms.clamp(max=clip_per_entry)).sum(dim=-1)
    if form == "generalized" and direction != "jsd":  # in `jsd` the two corrections cancel
        excess = (teacher.exp() - student.exp()).sum(dim=-1)
        value = value + excess if direction == "reverse" else value - excess
    return value


def pointwise_divergence(student: Tensor, teacher: Tensor, direction: Direction, beta: float = 0.5) -> Tensor:
    """Compute the term of each bucket; inputs are finite (floored) log-probabilities of one shape."""
    if direction == "reverse":
        return student.exp() * (student - teacher)
    if direction == "forward":
        return teacher.exp() * (teacher - student)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * teacher.exp() * (teacher - mixture) + (1 - beta) * student.exp() * (student - mixture)


def _floored(values: Tensor) -> Tensor:
    """Raise values to the floor, without gradient there (``exp`` of the floor is 0)."""
    return values.clamp(min=LOGPROB_FLOOR)


def _log_rest(logprobs: LogProbs) -> PerToken:
    """Compute log (1 - Σ exp) in float64; the floor where no mass is left.

    The result is as exact as the inputs: with float32 a mass under 1e-7 is noise, so pass real tails if available.
    """
    inside = logprobs.double().logsumexp(dim=-1)
    rest = -torch.expm1(inside)
    positive = rest > 0
    # The inner `where` keeps log's gradient finite in the branch that is not taken.
    return torch.where(positive, torch.where(positive, rest, 1.0).log(), LOGPROB_FLOOR).to(logprobs.dtype)


def policy_gradient(
    student_logprobs: PerToken,
    teacher_logprobs: PerToken,
    behaviour_logprobs: PerToken,
    *,
    ratio_clip: float | None = None,
) -> PerToken:
    """Compute the policy-gradient baseline, reverse KL as a reward on the sampled tokens, ``[T]``.

    The surrogate is ``-ρ A`` with A = log q - log p (detached) and ρ = p / p_behaviour, at most ``ratio_clip``. If the
    behaviour is the policy itself, its gradient is an unbiased but noisy estimate of the gradient of KL(p‖q).
    """
    advantages = (teacher_logprobs.float() - student_logprobs.float()).detach()
    return reward_term(student_logprobs, behaviour_logprobs, advantages, ratio_clip=ratio_clip)


def reward_term(
    student_logprobs: PerToken,
    behaviour_logprobs: PerToken,
    advantages: PerToken,
    *,
    ratio_clip: float | None = None,
) -> PerToken:
    """Compute ``-ρ A`` of the sampled tokens, ``[T]``, with ρ = p / p_behaviour, at most ``ratio_clip``.

    Its gradient is the policy gradient of the expected reward if A is a reward minus a baseline that does not depend on
    the token. A carries no gradient.
    """
    ratio = (student_logprobs.float() - behaviour_logprobs.detach().float()).exp()
    if ratio_clip is not None:
        ratio = ratio.clamp(max=ratio_clip)
    return -ratio * advantages.detach()


def negative_log_likelihood(student_logprobs: PerToken) -> PerToken:
    """Compute ``-log p`` of the sampled tokens, ``[T]``: the baseline of sequence-level distillation."""
    return -student_logprobs.float()


def limit_per_token(values: PerToken, limit: float | None) -> PerToken:
    """Clip values at `limit` nats; a token above it has no gradient (style tokens carry most of the divergence)."""
    return values if limit is None else values.clamp(max=limit)


def _check(
    student: Tensor,
    teacher: Tensor,
    student_tail: Tensor | None,
    teacher_tail: Tensor | None,
    direction: str,
    beta: float,
) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must both be [T, k], at the same ids"
        )
    for name, tail in (("student_tail", student_tail), ("teacher_tail", teacher_tail)):
        if tail is not None and tail.shape != student.shape[:1]:
            raise ValueError(f"{name} is {tuple(tail.shape)}, expected [{student.shape[0]}]")
    if direction not in ("reverse", "forward", "jsd"):
        raise ValueError(f"unknown direction {direction!r}; known: reverse, forward, jsd")
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, it must lie between 0 and 1")
