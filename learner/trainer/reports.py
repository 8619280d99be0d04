"""What the ranks tell the controller: small values only, never tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common.weight_sync.manifest import TensorSpec
from learner.trainer.token_records import TokenRecord


@dataclass(frozen=True, slots=True)
class LearnerInfo:
    """A rank that is set up. ``tensors`` is the sending order of a weight sync; ``zero_stage`` the one in force."""

    rank: int
    world_size: int
    device: str
    dtype: str
    zero_stage: int
    parameters: int
    vocab_size: int
    max_sequence_tokens: int
    tensors: tuple[TensorSpec, ...]
    weight_version: int


@dataclass(frozen=True, slots=True)
class AccumulateReport:
    """One `accumulate` call of one rank. Times are seconds since the epoch; ``padded_tokens`` is what the forward
    passes computed; ``sums`` are metric sums over ``loss_tokens`` (the response tokens not skipped by the loss);
    ``nonfinite`` names samples whose loss was NaN or infinite.
    """

    sequences: int
    response_tokens: int
    loss_tokens: int
    padded_tokens: int
    micro_batches: int
    started: float
    ended: float
    sums: dict[str, float] = field(default_factory=dict)
    nonfinite: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimiser step, equal on every rank but for what is said to be of "this rank".

    ``weight_version`` counts finished steps, skipped ones too (their weights equal the version before).
    ``skipped_in_a_row`` counts those that a NaN or infinite gradient cost. ``uncounted`` says why the loss counted no
    token of the step (empty: it did), ``uncounted_in_a_row`` how often that was so; such steps are skipped, too, and
    neither add to ``skipped_in_a_row`` nor end it.
    ``metrics`` are global means over the step's loss tokens, and `loss grad_norm update_norm lr`; ``nonfinite`` names
    this rank's samples with a NaN or infinite loss, ``records`` are some of them as plain values; ``tokens`` are a few
    of this rank's answers token by token.
    """

    weight_version: int
    applied: bool
    skipped_in_a_row: int
    metrics: dict[str, float]
    nonfinite: tuple[str, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    uncounted: str = ""
    uncounted_in_a_row: int = 0


@dataclass(frozen=True, slots=True)
class PassReport:
    """A pass of one rank over answers that are not scored yet (`LearnerRank.prepare`). ``agreements``: for each answer
    the share of the learner's ids that the engine had picked, None where it had picked none. Times are seconds since
    the epoch.
    """

    agreements: tuple[float | None, ...]
    started: float
    ended: float
