"""Importance weights for tokens sampled under other weights: they correct a step on stale rollouts.

π is the policy being trained; μ is the policy that sampled, i.e. the engine under older weights or in another
precision. Both log-probs are those of the sampled tokens, at the sampling temperature.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PerToken = Float[Tensor, " R"]


class PrefixRatios:
    """Truncated importance ratio of the prefix of each token, computed over rows that come in order, chunk by chunk.

    ``w_t = min(∏_{i<t} π(y_i | y_<i) / μ(y_i | y_<i), c)`` with ``c = ratio_clip``, so the first token of a sample has
    weight 1. The ratio belongs to a divergence over the vocabulary at position t, which depends on the prefix and not
    on y_t: ``E_μ[w_t KL_t] = E_π[KL_t]`` where nothing is truncated. (The ratio of y_t itself has mean 1 given the
    prefix: it would add noise and correct nothing.) Sums are kept as logs in float64, so no ratio overflows.
    """

    def __init__(self, ratio_clip: float) -> None:
        """Raises ValueError unless `ratio_clip` is positive."""
        if not ratio_clip > 0:
            raise ValueError(f"ratio_clip is {ratio_clip}, it must be positive")
        self._log_clip = math.log(ratio_clip)
        self._carry: tuple[Tensor, Tensor] | None = None
        """Sample of the last row, and log of its untruncated ratio up to and including that row."""

    def __call__(
        self,
        learner_logprobs: PerToken,
        engine_logprobs: PerToken,
        sample_index: Int[Tensor, " R"],
        is_student: Bool[Tensor, " R"],
    ) -> PerToken:
        """Return the weights of the next rows, ``[R]`` float32, without gradient; a chunk may end inside a sample.

        `sample_index` maps each row to its sample; the rows of a sample are contiguous. Rows outside `is_student` are
        tokens of an environment, equally likely under π and μ: their own ratio is 1.
        """
        difference = learner_logprobs.detach().double() - engine_logprobs.detach().double()
        difference = torch.where(is_student, difference, 0.0)
        if not len(difference):
            return difference.float()
        before = difference.cumsum(0) - difference
        _, lengths = torch.unique_consecutive(sample_index, return_counts=True)
        starts = lengths.cumsum(0) - lengths
        log_ratios = before - before[starts].repeat_interleave(lengths)
        if self._carry is not None:
            sample, carried = self._carry
            log_ratios = log_ratios + torch.where(sample_index == sample, carried, 0.0)
        self._carry = sample_index[-1], log_ratios[-1] + difference[-1]
        return log_ratios.clamp(max=self._log_clip).exp().float()
