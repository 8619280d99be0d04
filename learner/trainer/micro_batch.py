"""The micro-batch: sequences, and the values that the loss needs for every response token, as tensors."""

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
class MicroBatch:
    """One row per response token, R in all; the support has k ids.

    ``ids [R, k]``: the support, `PAD_ID` in unused columns. ``teacher_logprobs [R, k]`` and ``teacher_tail [R]``: the
    teacher on the support and outside it. ``teacher_sampled [R]``, ``engine_sampled [R]``: log-probs of the sampled
    tokens. ``advantages [R]``: of the response's reward. ``weights [R]``: 0 for tokens that the loss skips, 1/|y| under
    sequence normalisation. ``sample_index [R]`` indexes `sample_ids`. ``is_student [R]`` is False for tokens of an
    environment. ``from_teacher [R]`` marks stored responses of the teacher's. ``in_student_topk [R, k]`` marks ids that
    the student picked at sampling time. ``topk_overlap [R]``: share of the teacher's top k that the student picked too;
    NaN if the teacher's top k is unknown. `data_sets` names the set of each sample's row.
    """

    sequences: SequenceBatch
    ids: Int[Tensor, "R k"]
    teacher_logprobs: Float[Tensor, "R k"]
    teacher_tail: Float[Tensor, " R"]
    teacher_sampled: Float[Tensor, " R"]
    engine_sampled: Float[Tensor, " R"]
    advantages: Float[Tensor, " R"]
    weights: Float[Tensor, " R"]
    sample_index: Int[Tensor, " R"]
    is_student: Bool[Tensor, " R"]
    from_teacher: Bool[Tensor, " R"]
    in_student_topk: Bool[Tensor, "R k"]
    topk_overlap: Float[Tensor, " R"]
    sample_ids: tuple[str, ...]
    data_sets: tuple[str, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(**{name: v.to(device) if hasattr(v, "to") else v for name, v in values.items()})


def build_micro_batch(scored: Sequence[ScoredTrajectory], loss: LossConfig, layout: Layout = PADDED) -> MicroBatch:
    """Build the micro-batch of `scored`, its sequences in `layout`.

    Raises ValueError, naming the sample, for arrays that do not fit its response.
    """
    for item in scored:
        _check(item)
    width = max(_support_ids(item).shape[1] for item in scored)
    marks = [_in_student_topk(item) for item in scored]
    overlaps = [_topk_overlap(item, marked, loss) for item, marked in zip(scored, marks, strict=True)]
    return MicroBatch(
        sequences=layout.lay_out([student_sequence(item) for item in scored]),
        ids=_long(np.concatenate([_widen(_support_ids(item), width, PAD_ID) for item in scored])),
        teacher_logprobs=_float(np.concatenate([_widen(item.score.logprobs, width, LOGPROB_FLOOR) for item in scored])),
        teacher_tail=_float(np.concatenate([item.score.tail_logprob for item in scored])),
        teacher_sampled=_float(np.concatenate([item.score.sampled_logprob for item in scored])),
        engine_sampled=_float(np.concatenate([item.trajectory.sampled_logprobs for item in scored])),
        advantages=_float(
            np.repeat([item.advantage for item in scored], [len(item.trajectory.response_ids) for item in scored])
        ),
        weights=_float(np.concatenate([token_weights(item.trajectory, loss) for item in scored])),
        sample_index=_long(np.repeat(np.arange(len(scored)), [len(item.trajectory.response_ids) for item in scored])),
        is_student=torch.from_numpy(np.concatenate([_student_mask(item.trajectory) for item in scored])),
        from_teacher=torch.from_numpy(
            np.repeat(
                [item.trajectory.from_teacher for item in scored],
                [len(item.trajectory.response_ids) for item in scored],
            )
        ),
        in_student_topk=torch.from_numpy(np.concatenate([_widen(marked, width, False) for marked in marks])),
        topk_overlap=_float(np.concatenate(overlaps)),
        sample_ids=tuple(item.trajectory.sample_id for item in scored),
        data_sets=tuple(item.data_set for item in scored),
    )


def empty_micro_batch(layout: Layout = PADDED) -> MicroBatch:
    """Build a micro-batch of one token of weight 0: its pass joins the collectives and adds zero gradients."""
    ids = as_ids([0])
    return MicroBatch(
        sequences=layout.lay_out([TokenSequence(ids, ids)]),
        ids=torch.zeros(1, 1, dtype=torch.long),
        teacher_logprobs=torch.zeros(1, 1),
        teacher_tail=torch.zeros(1),
        teacher_sampled=torch.zeros(1),
        engine_sampled=torch.zeros(1),
        advantages=torch.zeros(1),
        weights=torch.zeros(1),
        sample_index=torch.zeros(1, dtype=torch.long),
        is_student=torch.ones(1, dtype=torch.bool),
        from_teacher=torch.zeros(1, dtype=torch.bool),
        in_student_topk=torch.ones(1, 1, dtype=torch.bool),
        topk_overlap=torch.zeros(1),
        sample_ids=("nothing",),
        data_sets=("train",),
    )


def student_sequence(scored: ScoredTrajectory) -> TokenSequence:
    """Return the student's prompt (without the context) and the response."""
    return TokenSequence(scored.trajectory.prompt.student_ids, scored.trajectory.response_ids)


def _support_ids(scored: ScoredTrajectory) -> Ids:
    """Return the ids of the teacher's log-probs, ``[T, k]``: those that it returned, or the student's top k."""
    returned = scored.score.topk_ids
    return scored.trajectory.topk_ids if returned is None else returned


def _in_student_topk(scored: ScoredTrajectory) -> np.ndarray:
    """Mark the ids of the support that are in the student's top k, ``[T, k]``."""
    if scored.score.topk_ids is None:
        return scored.trajectory.topk_ids != PAD_ID
    ids, student_ids = scored.score.topk_ids, scored.trajectory.topk_ids
    # One set test for all rows: the row number above the id's 24 bits makes ids of different rows distinct.
    rows = np.arange(len(ids), dtype=np.int64)[:, None] << 24
    return np.isin(ids + rows, student_ids + rows) & (ids != PAD_ID)


def _topk_overlap(scored: ScoredTrajectory, marked: np.ndarray, loss: LossConfig) -> np.ndarray:
    """Return the share of the teacher's top k in the student's, ``[T]``; NaN if the student alone picked the support.

    A union of two sets of k ids has 2k - overlap members, so its size gives the overlap.
    """
    tokens, student_k = marked.shape[0], scored.trajectory.topk_ids.shape[1]
    if scored.score.topk_ids is None or not student_k:
        return np.full(tokens, np.nan)
    if loss.support == "teacher":
        return marked.sum(-1) / loss.top_k
    return (student_k + loss.top_k - (scored.score.topk_ids != PAD_ID).sum(-1)) / loss.top_k


def counted_tokens(trajectory: Trajectory, loss: LossConfig) -> Mask:
    """Mark the response tokens that the loss counts, ``[T]``: the student's, without the first ones of each turn.

    Raises ValueError, naming the sample, for a mask that does not fit its response.
    """
    return _turn_positions(trajectory) > loss.skip_first_tokens


def longest_turn(trajectory: Trajectory) -> int:
    """Return the tokens of the student's longest turn."""
    return int(_turn_positions(trajectory).max(initial=0))


def _turn_positions(trajectory: Trajectory) -> NDArray[np.int64]:
    """Return each token's position in its turn, ``[T]``, counted from 1; 0 for tokens of an environment."""
    positions, mask = np.arange(len(trajectory.response_ids)), trajectory.loss_mask
    if mask is None:
        return positions + 1
    if mask.shape != positions.shape:
        raise ValueError(f"sample {trajectory.sample_id}: loss mask is {mask.shape}, expected {positions.shape}")
    return positions - np.maximum.accumulate(np.where(mask, -1, positions))


def _student_mask(trajectory: Trajectory) -> Mask:
    mask = trajectory.loss_mask
    return np.ones(len(trajectory.response_ids), dtype=bool) if mask is None else mask


def count_loss_tokens(trajectory: Trajectory, loss: LossConfig) -> int:
    """Count the response tokens that the loss counts."""
    return int(counted_tokens(trajectory, loss).sum())


def token_weights(trajectory: Trajectory, loss: LossConfig) -> np.ndarray:
    """Return each token's weight in the step's sum, ``[T]``: 0 if not counted, else 1, or 1/|y| per sequence."""
    counted = counted_tokens(trajectory, loss)
    each = 1.0 if loss.normalize == "token" else 1.0 / max(counted.sum(), 1)
    return np.where(counted, each, 0.0).astype(np.float32)


def _check(item: ScoredTrajectory) -> None:
    trajectory, score = item.trajectory, item.score
    tokens, ids = len(trajectory.response_ids), _support_ids(item)
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
