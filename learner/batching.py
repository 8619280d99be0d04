"""Micro-batches: which answers go together, and the padded tensors of one. Pure: no DeepSpeed, no Ray.

Row t of a response is predicted by the hidden state at position ``len(prompt) + t - 1``, the last position that has
not seen ``response_ids[t]``. Which tokens count is known from lengths, never from ``ids != pad`` (pad often is eos).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.config import LossConfig
from common.schema import LOGPROB_FLOOR, PAD_ID, Ids, Mask, ScoredTrajectory, TokenSequence, Trajectory, as_ids

B = TypeVar("B", "PaddedBatch", "TrainingBatch")


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """B sequences padded on the right to L, and where their R response tokens are.

    ``input_ids [B, L]``, ``attention_mask [B, L]``; ``positions [R]`` index the flattened ``[B * L]`` hidden states
    that predict the response tokens ``response_ids [R]``, sequence after sequence; ``lengths`` are response lengths.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    positions: Int[Tensor, " R"]
    response_ids: Int[Tensor, " R"]
    lengths: tuple[int, ...]

    @property
    def padded_tokens(self) -> int:
        """What a forward pass computes."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> PaddedBatch:
        """The same on `device`."""
        return _moved(self, device)


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

    sequences: PaddedBatch
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
        return _moved(self, device)


def plan_micro_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Indices cut into micro-batches: longest first, each at most `budget_tokens` padded tokens.

    A sequence longer than the budget is one by itself. Equal lengths keep their order, so the plan is a function of
    its input.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        # The first of a batch is its longest, so the padded size is known when it opens.
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > budget_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def pad_sequences(sequences: Sequence[TokenSequence]) -> PaddedBatch:
    """Prompt + response of each, padded on the right.

    Raises ValueError for an empty prompt (nothing would predict the first response token) or an empty response.
    """
    longest = max(len(s.prompt_ids) + len(s.response_ids) for s in sequences)
    input_ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros((len(sequences), longest), dtype=np.int64)
    positions = []
    for row, sequence in enumerate(sequences):
        prompt, response = len(sequence.prompt_ids), len(sequence.response_ids)
        if not prompt or not response:
            raise ValueError(f"sequence {row} has {prompt} prompt and {response} response tokens: both must be there")
        input_ids[row, :prompt] = sequence.prompt_ids
        input_ids[row, prompt : prompt + response] = sequence.response_ids
        mask[row, : prompt + response] = 1
        positions.append(row * longest + response_positions(prompt, response))
    return PaddedBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        positions=torch.from_numpy(np.concatenate(positions)),
        response_ids=_long(np.concatenate([s.response_ids for s in sequences])),
        lengths=tuple(len(s.response_ids) for s in sequences),
    )


def response_positions(prompt: int, response: int) -> np.ndarray:
    """Positions of the hidden states that predict the response: one before each of its tokens."""
    return np.arange(prompt - 1, prompt + response - 1)


def training_batch(scored: Sequence[ScoredTrajectory], loss: LossConfig) -> TrainingBatch:
    """The micro-batch of `scored`.

    Raises ValueError, naming the sample, for arrays that do not fit its response.
    """
    for item in scored:
        _check(item)
    width = max(support(item).shape[1] for item in scored)
    stored = [picked_by_student(item) for item in scored]
    return TrainingBatch(
        sequences=pad_sequences([sequence_of(item) for item in scored]),
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


def empty_batch() -> TrainingBatch:
    """One token of weight zero: a pass that takes part in the collectives and adds zero gradients."""
    ids = as_ids([0])
    return TrainingBatch(
        sequences=pad_sequences([TokenSequence(ids, ids)]),
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
    positions, mask = np.arange(len(trajectory.response_ids)), trajectory.loss_mask
    if mask is None:
        return positions >= loss.skip_first_tokens
    if mask.shape != positions.shape:
        raise ValueError(f"sample {trajectory.sample_id}: loss mask is {mask.shape}, expected {positions.shape}")
    last_foreign = np.maximum.accumulate(np.where(mask, -1, positions))
    return positions - last_foreign > loss.skip_first_tokens


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


def _moved(batch: B, device: torch.device) -> B:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return type(batch)(**{name: v.to(device) if hasattr(v, "to") else v for name, v in values.items()})
