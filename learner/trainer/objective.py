"""The loss of one micro-batch, called by the output layer chunk by chunk; it also sums the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.config.model import LossConfig, MixedLoss
from learner.trainer.importance import PrefixRatios
from learner.trainer.losses import (
    limit_per_token,
    negative_log_likelihood,
    pointwise_divergence,
    policy_gradient,
    reward_term,
    topk_divergence,
)
from learner.trainer.micro_batch import MicroBatch
from learner.trainer.output_layer import ChunkView
from learner.trainer.step_metrics import METRICS
from learner.trainer.token_watch import TokenWatch


def divergence(
    loss: LossConfig, student: Tensor, student_tail: Tensor, teacher: Tensor, teacher_tail: Tensor
) -> Tensor:
    """Return the divergence that `loss` asks for, ``[c]``: log-probs on the support ``[c, k]``, outside it ``[c]``."""
    assert loss.form != "policy_gradient"
    assert loss.form != "nll"
    return topk_divergence(
        student,
        teacher,
        form=loss.form,
        direction=loss.direction,
        beta=loss.beta,
        student_tail=student_tail,
        teacher_tail=teacher_tail,
        clip_per_entry=loss.clip_per_entry,
    )


@dataclass
class Objective:
    """Maps each chunk to the weighted sum to minimise, and collects the sums of `METRICS`.

    `scale` multiplies the gradient, not the metrics: the world size, since DeepSpeed averages gradients over ranks.
    """

    batch: MicroBatch
    config: LossConfig
    mixed: Mapping[str, MixedLoss] = field(default_factory=dict)
    """Losses of the sets of `data.mix`, by name."""
    scale: float = 1.0
    sums: Tensor | None = None
    watch: TokenWatch | None = None
    """Receives the per-token values of a few samples."""
    _ratios: PrefixRatios | None = field(init=False)
    _nonfinite: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        sets = list(dict.fromkeys(self.batch.data_sets))
        losses = [self.mixed.get(name, MixedLoss()) for name in sets]
        self._losses = [self.config.of_mixed(one) for one in losses]
        device = self.batch.weights.device
        self._set_of_sample = torch.tensor([sets.index(name) for name in self.batch.data_sets], device=device)
        self._factors = torch.tensor([one.weight for one in losses], device=device)
        clip = self.config.importance_clip
        self._ratios = None if clip is None else PrefixRatios(clip)

    def __call__(self, chunk: ChunkView) -> Tensor:
        batch, rows = self.batch, chunk.rows
        weights, config = batch.weights[rows], self.config
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
            values = self._divergence(chunk)
        factors = self._factors[self._sets(chunk)]
        values = factors * limit_per_token(values, config.clip_per_token)
        rewards = factors * self._rewards(chunk)
        with torch.no_grad():
            importance = self._importance(chunk)
            self._collect(chunk, values + rewards, importance)
        # A skipped token's value may be infinite: 0 * inf would poison the sum.
        return torch.where(weights > 0, weights * (values * importance + rewards), 0.0).sum() * self.scale

    def _sets(self, chunk: ChunkView) -> Tensor:
        """Return the number of each token's set, ``[c]``."""
        return self._set_of_sample[self.batch.sample_index[chunk.rows]]

    def _divergence(self, chunk: ChunkView) -> Tensor:
        """Return each token's divergence, ``[c]``, by the loss of its set."""
        teacher, tail = self.batch.teacher_logprobs[chunk.rows], self.batch.teacher_tail[chunk.rows]
        if len(self._losses) == 1:
            return divergence(self._losses[0], chunk.logprobs, chunk.tail, teacher, tail)
        sets, values = self._sets(chunk), torch.zeros_like(chunk.tail)
        for number, loss in enumerate(self._losses):
            own = sets == number
            part = divergence(loss, chunk.logprobs[own], chunk.tail[own], teacher[own], tail[own])
            values = values.masked_scatter(own, part.to(values.dtype))
        return values

    def _rewards(self, chunk: ChunkView) -> Tensor:
        """Return the reward's term of each token, ``[c]``; zeros without `loss.reward_weight`."""
        batch, rows, config = self.batch, chunk.rows, self.config
        if not config.reward_weight:
            return torch.zeros_like(chunk.sampled)
        return config.reward_weight * reward_term(
            chunk.sampled, batch.engine_sampled[rows], batch.advantages[rows], ratio_clip=config.ratio_clip
        )

    def _importance(self, chunk: ChunkView) -> Tensor:
        """Return each token's prefix ratio, ``[c]``; ones without `loss.importance_clip`."""
        if self._ratios is None:
            return torch.ones_like(chunk.sampled)
        batch, rows = self.batch, chunk.rows
        return self._ratios(chunk.sampled, batch.engine_sampled[rows], batch.sample_index[rows], batch.is_student[rows])

    def _collect(self, chunk: ChunkView, values: Tensor, importance: Tensor) -> None:
        batch, rows = self.batch, chunk.rows
        student, tail = chunk.logprobs, chunk.tail
        teacher, teacher_tail = batch.teacher_logprobs[rows], batch.teacher_tail[rows]
        on_support = pointwise_divergence(student, teacher, "reverse").sum(-1)
        in_tail = pointwise_divergence(tail, teacher_tail, "reverse")
        by_student = ~batch.from_teacher[rows]
        mismatch = torch.where(by_student, batch.engine_sampled[rows] - chunk.sampled, 0.0)
        columns = (
            values,
            on_support,
            in_tail,
            on_support + in_tail,
            student.exp().sum(-1),
            teacher.exp().sum(-1),
            torch.where(batch.in_student_topk[rows], student.exp(), 0.0).sum(-1),
            batch.topk_overlap[rows],
            -(student.exp() * student).sum(-1) - tail.exp() * tail,
            by_student.to(mismatch.dtype),
            mismatch.abs(),
            mismatch.square(),
            ((mismatch.neg().exp() - 1).abs() <= 0.1).logical_not().to(mismatch.dtype),  # NaN is outside
            importance,
            importance.square(),
        )
        counted = batch.weights[rows] > 0
        sums = torch.where(counted.unsqueeze(-1), torch.stack(columns, dim=-1), 0.0).double().sum(dim=0)
        self.sums = sums if self.sums is None else self.sums + sums
        if self.watch is not None:
            self.watch.add_chunk(chunk, teacher, on_support + in_tail)
        self._nonfinite.append(batch.sample_index[rows][counted & ~values.isfinite()])

    def metric_sums(self) -> dict[str, float]:
        """Return the sums over the loss's tokens by metric."""
        values = [0.0] * len(METRICS) if self.sums is None else self.sums.tolist()
        return dict(zip(METRICS, values, strict=True))

    def nonfinite_samples(self) -> tuple[str, ...]:
        """Return the samples that have a token with a NaN or infinite loss."""
        indices = torch.cat(self._nonfinite).unique().tolist() if self._nonfinite else []
        return tuple(self.batch.sample_ids[index] for index in indices)
