"""Weights for answers that another policy made: what corrects a step on samples of older weights.

π is the policy being trained, μ the one that sampled: the engine under older weights or in another precision. Both
log-probs must be of the sampled tokens at the sampling temperature.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerToken = Float[Tensor, " R"]


def token_ratios(learner_logprobs: PerToken, behaviour_logprobs: PerToken, ratio_clip: float) -> PerToken:
    """Truncated importance ratio of each sampled token, ``[R]`` f32 without a gradient.

    ``w_t = min(π(y_t | y_<t) / μ(y_t | y_<t), c)`` with ``c = ratio_clip``, computed as
    ``exp(min(log π − log μ, log c))``, so no ratio overflows. It belongs to a term that depends on the choice of y_t:
    the policy-gradient baseline.
    """
    difference = learner_logprobs.detach().double() - behaviour_logprobs.detach().double()
    return _truncated(difference, ratio_clip)


def prefix_ratios(
    learner_logprobs: PerToken, behaviour_logprobs: PerToken, owners: Int[Tensor, " R"], ratio_clip: float
) -> PerToken:
    """Truncated importance ratio of what stands before each token, ``[R]`` f32 without a gradient.

    ``w_t = min(∏_{i<t} π(y_i | y_<i) / μ(y_i | y_<i), c)``, so 1 for an answer's first token. It belongs to a
    divergence over the vocabulary at position t: that does not depend on y_t, only on the prefix it is taken under,
    and ``E_μ[w_t KL_t] = E_π[KL_t]`` where nothing is truncated. (`token_ratios` has mean 1 given the prefix: there it
    would add noise and correct nothing.) `owners` says which answer a row is of; answers lie one after another.
    """
    return PrefixRatios(ratio_clip)(learner_logprobs, behaviour_logprobs, owners)


class PrefixRatios:
    """`prefix_ratios` of rows that come chunk by chunk, in order: a chunk may end inside an answer."""

    def __init__(self, ratio_clip: float) -> None:
        self._ratio_clip = ratio_clip
        self._carry: tuple[Tensor, Tensor] | None = None
        """Answer of the last row, and log of the untruncated ratio of all of it so far, that row included."""

    def __call__(
        self,
        learner_logprobs: PerToken,
        behaviour_logprobs: PerToken,
        owners: Int[Tensor, " R"],
        chosen: Bool[Tensor, " R"] | None = None,
    ) -> PerToken:
        """Weights of the next rows, ``[R]`` f32. Rows that are not `chosen` stand in the prefix, but the policy did not
        choose their tokens (an environment did, under either policy alike): their own ratio is 1.
        """
        difference = learner_logprobs.detach().double() - behaviour_logprobs.detach().double()
        if chosen is not None:
            difference = torch.where(chosen, difference, 0.0)
        if not len(difference):
            return difference.float()
        before = difference.cumsum(0) - difference
        _, lengths = torch.unique_consecutive(owners, return_counts=True)
        starts = lengths.cumsum(0) - lengths
        log_ratios = before - before[starts].repeat_interleave(lengths)
        if self._carry is not None:
            owner, carried = self._carry
            log_ratios = log_ratios + torch.where(owners == owner, carried, 0.0)
        self._carry = owners[-1], log_ratios[-1] + difference[-1]
        return _truncated(log_ratios, self._ratio_clip)


def effective_share(weights: PerToken) -> float:
    """Effective sample size over the number of tokens, ``(Σw)² / (R Σw²)``: 1 where all weigh the same; 0 for none."""
    squares = weights.double().square().sum() * weights.numel()
    return float(weights.double().sum().square() / squares) if squares else 0.0


def _truncated(log_ratios: Tensor, ratio_clip: float) -> Tensor:
    if not ratio_clip > 0:
        raise ValueError(f"ratio_clip {ratio_clip} must be positive")
    return log_ratios.clamp(max=math.log(ratio_clip)).exp().float()
