"""Reports from the ranks to the driver: small values only, never tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.weight_sync.manifest import TensorSpec
from learner.trainer.token_records import TokenRecord


@dataclass(frozen=True, slots=True)
class LearnerInfo:
    """A rank after setup. ``tensors`` is the sending order of a weight sync; ``zero_stage`` is the effective stage.

    ``packed`` ranks compute sequences end to end; ``unpacked`` is the reason if packing was asked for and refused.
    """

    rank: int
    world_size: int
    device: str
    dtype: str
    zero_stage: int
    parameters: int
    vocab_size: int
    tensors: tuple[TensorSpec, ...]
    weight_version: int
    memory_bytes: int = 0
    """Memory that the rank may take on its GPU; 0 on CPU."""
    packed: bool = False
    unpacked: str = ""


@dataclass(frozen=True, slots=True)
class AccumulateReport:
    """One `accumulate` call on one rank; times are seconds since the epoch.

    ``padded_tokens`` counts the tokens of the forward passes, padding included. ``samples`` are the ids of the batch.
    """

    sequences: int
    padded_tokens: int
    started: float
    ended: float
    samples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimiser step. ``nonfinite``, ``skipped_records`` and ``token_records`` differ by rank; the rest is global.

    ``weight_version`` counts finished steps, skipped ones included (their weights equal the version before).
    ``skipped_in_a_row`` counts consecutive steps skipped for a NaN or infinite gradient. ``uncounted`` is the reason
    why the loss counted no token (empty if it counted some), ``uncounted_in_a_row`` the number of consecutive such
    steps. They are skipped as well, but neither increase nor reset ``skipped_in_a_row``.
    ``metrics`` are global means over the step's loss tokens, and ``grad_norm update_norm lr skipped``.
    ``nonfinite`` names this rank's samples with a NaN or infinite loss, ``skipped_records`` shows some of them, and
    ``token_records`` shows a few of this rank's trajectories token by token.
    """

    weight_version: int
    applied: bool
    skipped_in_a_row: int
    metrics: dict[str, float]
    nonfinite: tuple[str, ...] = ()
    skipped_records: tuple[dict[str, Any], ...] = ()
    token_records: tuple[TokenRecord, ...] = ()
    uncounted: str = ""
    uncounted_in_a_row: int = 0


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """One rank's pass over trajectories without a score (`LearnerRank.prepare`); times are seconds since the epoch.

    ``agreements`` holds, per trajectory, the share of the learner's top-k ids that the engine had picked too; None if
    the engine picked none.
    """

    agreements: tuple[float | None, ...]
    started: float
    ended: float
