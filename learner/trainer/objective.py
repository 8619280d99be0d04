"""The loss of one micro-batch as the output layer sees it: chunk by chunk, with the metrics that say what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.config.model import LossConfig
from learner.trainer.batching import TrainingBatch
from learner.trainer.importance import PrefixRatios
from learner.trainer.losses import (
    limit_per_token,
    negative_log_likelihood,
    pointwise_divergence,
    policy_gradient,
    topk_divergence,
)
from learner.trainer.output_layer import ChunkView
from learner.trainer.token_watch import TokenWatch

METRICS = (
    "loss",
    "kl/support",
    "kl/tail",
    "kl/lower_bound",
    "mass/student_topk",
    "mass/teacher_topk",
    "support_coverage",
    "topk_overlap",
    "entropy",
    "mismatch/abs",
    "mismatch/squared",
    "mismatch/outside",
    "importance/mean",
    "importance/squared",
)
"""Per-token values, in this order, summed over the loss's tokens.

``loss``: the value minimised, before the weights. ``kl/support`` and ``kl/tail``: the parts of the reverse KL on the
support and in the tail bucket, whatever the form; ``kl/lower_bound`` their sum, a lower bound of the full KL.
``mass/*``: mass of either side on the support. ``support_coverage``: the student's mass, under the weights that are
being trained, on the ids picked when the answer was made, as far as the support holds them (not all of them where the
teacher picks it). ``topk_overlap``: share of the teacher's top k among the student's (NaN where only the student picks).
``entropy`` of the student on the support and the tail bucket. ``mismatch/*``: |.| and
square of engine minus learner log-prob of the sampled token (where both are at one temperature); ``mismatch/outside``: 1
where the ratio of their probabilities lies outside [0.9, 1.1]. ``importance/*``: the weight of what stands before the
token (``loss.importance_clip``; 1 without it), and its square.
"""


@dataclass
class Objective:
    """Called by the output layer with each chunk; returns the weighted sum to minimise and collects metrics.

    `scale` multiplies the gradient (the world size, where ranks' gradients are averaged), not the metrics.
    """

    batch: TrainingBatch
    config: LossConfig
    scale: float = 1.0
    sums: Tensor | None = None
    watch: TokenWatch | None = None
    """Takes single tokens' values, of a few answers."""
    _ratios: PrefixRatios | None = field(init=False)
    _bad: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        clip = self.config.importance_clip
        self._ratios = None if clip is None else PrefixRatios(clip)

    def __call__(self, chunk: ChunkView) -> Tensor:
        batch, rows = self.batch, chunk.rows
        teacher, teacher_tail, weights = batch.teacher_logprobs[rows], batch.teacher_tail[rows], batch.weights[rows]
        config = self.config
        if config.form == "policy_gradient":
            values = policy_gradient(
                chunk.sampled,
                batch.teacher_sampled[rows],
                batch.engine_sampled[rows],
                ratio_clip=config.ratio_clip,
            )
        elif config.form == "nll":
            values = negative_log_likelihood(chunk.sampled)
        else:
            values = topk_divergence(
                chunk.logprobs,
                teacher,
                form=config.form,
                direction=config.direction,
                beta=config.beta,
                student_tail=chunk.tail,
                teacher_tail=teacher_tail,
            )
        values = limit_per_token(values, config.clip_per_token)
        with torch.no_grad():
            importance = self._importance(chunk)
            self._collect(chunk, values, teacher, teacher_tail, weights, importance)
        # A skipped token's value may be infinite: 0 * inf would poison the sum.
        return torch.where(weights > 0, values * weights * importance, 0.0).sum() * self.scale

    def _importance(self, chunk: ChunkView) -> Tensor:
        """``[c]``: 1, or the ratio of the chances of what stands before each token."""
        if self._ratios is None:
            return torch.ones_like(chunk.sampled)
        batch, rows = self.batch, chunk.rows
        return self._ratios(chunk.sampled, batch.engine_sampled[rows], batch.owners[rows], batch.own[rows])

    def _collect(
        self,
        chunk: ChunkView,
        values: Tensor,
        teacher: Tensor,
        teacher_tail: Tensor,
        weights: Tensor,
        importance: Tensor,
    ) -> None:
        batch, rows = self.batch, chunk.rows
        student, tail = chunk.logprobs, chunk.tail
        on_support = pointwise_divergence(student, teacher, "reverse").sum(-1)
        in_tail = pointwise_divergence(tail, teacher_tail, "reverse")
        mass = student.exp().sum(-1)
        drift = batch.engine_sampled[rows] - chunk.sampled
        columns = (
            values,
            on_support,
            in_tail,
            on_support + in_tail,
            mass,
            teacher.exp().sum(-1),
            torch.where(batch.stored[rows], student.exp(), 0.0).sum(-1),
            batch.overlap[rows],
            -(student.exp() * student).sum(-1) - tail.exp() * tail,
            drift.abs(),
            drift.square(),
            ((drift.neg().exp() - 1).abs() <= 0.1).logical_not().to(drift.dtype),  # NaN is outside
            importance,
            importance.square(),
        )
        counted = weights > 0
        sums = torch.where(counted.unsqueeze(-1), torch.stack(columns, dim=-1), 0.0).double().sum(dim=0)
        self.sums = sums if self.sums is None else self.sums + sums
        if self.watch is not None:
            self.watch.see(chunk, teacher, on_support + in_tail)
        self._bad.append(batch.owners[rows][counted & ~values.isfinite()])

    def metric_sums(self) -> dict[str, float]:
        """Sums over the loss's tokens, by name."""
        values = [0.0] * len(METRICS) if self.sums is None else self.sums.tolist()
        return dict(zip(METRICS, values, strict=True))

    def nonfinite_samples(self) -> tuple[str, ...]:
        """Samples with a token whose loss was NaN or infinite."""
        owners = torch.cat(self._bad).unique().tolist() if self._bad else []
        return tuple(self.batch.sample_ids[owner] for owner in owners)
