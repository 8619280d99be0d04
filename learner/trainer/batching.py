"""The tensors of one micro-batch: its sequences, and what the loss needs of every response token. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from common.config.model import LossConfig
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID, Ids, Mask, ScoredTrajectory, TokenSequence, Trajectory, as_ids
from learner.trainer.batch_layout import PADDED, Layout, SequenceBatch


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """A micro-batch with everything the loss needs, one row per response token.

    ``ids [R, k]`` with `PAD_ID` in unused places, ``teacher_logprobs [R, k]``, ``teacher_tail [R]``,
    ``teacher_sampled [R]``, ``engine_sampled [R]`` (the engine's log-probs of the sampled tokens), ``weights [R]``
    (0 for tokens that the loss skips, 1/|y| under sequence normalisation), ``owners [R]`` (index into `sample_ids`),
    ``own [R]`` (False where an environment spoke).
    ``stored [R, k]`` marks the ids that the student picked when the answer was made; ``overlap [R]`` is the share of
    the teacher's top k that the student picked too (NaN where the teacher did not say what its top k is).
    """

    sequences: SequenceBatch
    ids: Int[Tensor, "R k"]
    teacher_logprobs: Float[Tensor, "R k"]
    teacher_tail: Float[Tensor, " R"]
    teacher_sampled: Float[Tensor, " R"]
    engine_sampled: Float[Tensor, " R"]
    weights: Float[Tensor, " R"]
    owners: Int[Tensor, " R"]
    own: Bool[Tensor, " R"]
    stored: Bool[Tensor, "R k"]
    overlap: Float[Tensor, " R"]
    sample_ids: tuple[str, ...]

    def to(self, device: torch.device) -> TrainingBatch:
        """The same on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainingBatch(**{name: v.to(device) if hasattr(v, "to") else v for name, v in values.items()})


def training_batch(scored: Sequence[ScoredTrajectory], loss: LossConfig, layout: Layout = PADDED) -> TrainingBatch:
    """The micro-batch of `scored`, its sequences under `layout`.

    Raises ValueError, naming the sample, for arrays that do not fit its response.
    """
    for item in scored:
        _check(item)
    width = max(support(item).shape[1] for item in scored)
    stored = [picked_by_student(item) for item in scored]
    return TrainingBatch(
        sequences=layout.lay_out([sequence_of(item) for item in scored]),
        ids=_long(np.concatenate([_widen(support(item), width, PAD_ID) for item in scored])),
        teacher_logprobs=_float(np.concatenate([_widen(item.score.logprobs, width, LOGPROB_FLOOR) for item in scored])),
        teacher_tail=_float(np.concatenate([item.score.tail_logprob for item in scored])),
        teacher_sampled=_float(np.concatenate([item.score.sampled_logprob for item in scored])),
        engine_sampled=_float(np.concatenate([item.trajectory.sampled_logprobs for item in scored])),
        weights=_float(np.concatenate([token_weights(item.trajectory, loss) for item in scored])),
        owners=_long(np.repeat(np.arange(len(scored)), [len(item.trajectory.response_ids) for item in scored])),
        own=torch.from_numpy(np.concatenate([own_tokens(item.trajectory) for item in scored])),
        stored=torch.from_numpy(np.concatenate([_widen(marks, width, False) for marks in stored])),
        overlap=_float(
            np.concatenate([overlap(item, marks, loss) for item, marks in zip(scored, stored, strict=True)])
        ),
        sample_ids=tuple(item.trajectory.sample_id for item in scored),
    )


def empty_batch(layout: Layout = PADDED) -> TrainingBatch:
    """One token of weight zero: a pass that takes part in the collectives and adds zero gradients."""
    ids = as_ids([0])
    return TrainingBatch(
        sequences=layout.lay_out([TokenSequence(ids, ids)]),
        ids=torch.zeros(1, 1, dtype=torch.long),
        teacher_logprobs=torch.zeros(1, 1),
        teacher_tail=torch.zeros(1),
        teacher_sampled=torch.zeros(1),
        engine_sampled=torch.zeros(1),
        weights=torch.zeros(1),
        owners=torch.zeros(1, dtype=torch.long),
        own=torch.ones(1, dtype=torch.bool),
        stored=torch.ones(1, 1, dtype=torch.bool),
        overlap=torch.zeros(1),
        sample_ids=("nothing",),
    )


def sequence_of(scored: ScoredTrajectory) -> TokenSequence:
    """What the student saw and answered."""
    return TokenSequence(scored.trajectory.prompt.student_ids, scored.trajectory.response_ids)


def support(scored: ScoredTrajectory) -> Ids:
    """Ids at which the teacher's log-probs are, ``[T, k]``: the ones it sent back, or the student's own."""
    returned = scored.score.topk_ids
    return scored.trajectory.topk_ids if returned is None else returned


def picked_by_student(scored: ScoredTrajectory) -> np.ndarray:
    """Which places of the support, ``[T, k]``, hold ids of the student's own top k."""
    if scored.score.topk_ids is None:
        return scored.trajectory.topk_ids != PAD_ID
    ids, own = scored.score.topk_ids, scored.trajectory.topk_ids
    # One set test for all rows: an id is made distinct by its row (ids are under 2**24).
    rows = np.arange(len(ids), dtype=np.int64)[:, None] << 24
    return np.isin(ids + rows, own + rows) & (ids != PAD_ID)


def overlap(scored: ScoredTrajectory, stored: np.ndarray, loss: LossConfig) -> np.ndarray:
    """Share of the teacher's top k among the student's, ``[T]``; NaN where the student alone picked the support.

    A union of two sets of k ids has 2k - overlap members, so its size tells.
    """
    tokens, own = stored.shape[0], scored.trajectory.topk_ids.shape[1]
    if scored.score.topk_ids is None or not own:
        return np.full(tokens, np.nan)
    if loss.support == "teacher":
        return stored.sum(-1) / loss.top_k
    return (own + loss.top_k - (scored.score.topk_ids != PAD_ID).sum(-1)) / loss.top_k


def counted_tokens(trajectory: Trajectory, loss: LossConfig) -> Mask:
    """Which response tokens the loss counts, ``[T]``: the student's own, but for the first ones of each answer.

    Raises ValueError, naming the sample, for a mask that does not fit its response.
    """
    return _places_in_answers(trajectory) > loss.skip_first_tokens


def longest_answer(trajectory: Trajectory) -> int:
    """Tokens that the student made in a row, at most: of a conversation, its longest answer."""
    return int(_places_in_answers(trajectory).max(initial=0))


def _places_in_answers(trajectory: Trajectory) -> NDArray[np.int64]:
    """Of each response token, ``[T]``, its place in the answer it belongs to, from 1; 0 where an environment spoke."""
    positions, mask = np.arange(len(trajectory.response_ids)), trajectory.loss_mask
    if mask is None:
        return positions + 1
    if mask.shape != positions.shape:
        raise ValueError(f"sample {trajectory.sample_id}: loss mask is {mask.shape}, expected {positions.shape}")
    return positions - np.maximum.accumulate(np.where(mask, -1, positions))


def own_tokens(trajectory: Trajectory) -> Mask:
    """Which response tokens the student made, ``[T]``."""
    mask = trajectory.loss_mask
    return np.ones(len(trajectory.response_ids), dtype=bool) if mask is None else mask


def loss_tokens(trajectory: Trajectory, loss: LossConfig) -> int:
    """How many tokens of a response the loss counts."""
    return int(counted_tokens(trajectory, loss).sum())


def token_weights(trajectory: Trajectory, loss: LossConfig) -> np.ndarray:
    """Weight of each response token in the step's sum, ``[T]``: 0 where not counted, else 1, or 1/|y| per sequence."""
    counted = counted_tokens(trajectory, loss)
    each = 1.0 if loss.normalize == "token" else 1.0 / max(counted.sum(), 1)
    return np.where(counted, each, 0.0).astype(np.float32)


def _check(item: ScoredTrajectory) -> None:
    trajectory, score = item.trajectory, item.score
    tokens, ids = len(trajectory.response_ids), support(item)
    shapes = {
        "support ids": (ids.shape, (tokens, *ids.shape[1:])),
        "teacher log-probs": (score.logprobs.shape, ids.shape),
        "teacher tail": (score.tail_logprob.shape, (tokens,)),
        "teacher sampled log-probs": (score.sampled_logprob.shape, (tokens,)),
        "engine sampled log-probs": (trajectory.sampled_logprobs.shape, (tokens,)),
    }
    for name, (found, expected) in shapes.items():
        if found != expected:
            raise ValueError(f"sample {trajectory.sample_id}: {name} are {found}, expected {expected}")
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"sample {trajectory.sample_id}: the support is {ids.shape}, expected [{tokens}, k] with k > 0"
        )
    if (ids[:, 0] == PAD_ID).any():
        raise ValueError(f"sample {trajectory.sample_id}: a position has no support (its first id is padding)")


def _widen(values: np.ndarray, width: int, fill: float | bool) -> np.ndarray:
    missing = width - values.shape[1]
    return values if not missing else np.pad(values, ((0, 0), (0, missing)), constant_values=fill)


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
