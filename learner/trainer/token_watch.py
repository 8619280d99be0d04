"""A few answers of each step token by token, out of values that the loss has at hand anyway.

Which ones is a function of their ids alone (`learner.trainer.token_records.place`), so it depends neither on the order
of arrival nor on the number of ranks, and long answers are as likely as short ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from common.config.model import LossConfig
from common.protocol.schema import ScoredTrajectory
from learner.trainer.batching import TrainingBatch, counted_tokens
from learner.trainer.output_layer import ChunkView
from learner.trainer.token_records import LIKELIEST, MOST_TOKENS, TokenRecord, first_places, record_tokens


@dataclass
class TokenWatch:
    """Takes the values of the watched answers of one micro-batch, chunk by chunk."""

    batch: TrainingBatch
    owners: Sequence[int]
    """Indices of the watched answers in the batch."""
    _mask: Tensor = field(init=False)
    _seen: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        owners = self.batch.owners
        watched = torch.isin(owners, torch.tensor(self.owners, device=owners.device))
        # Rows of one answer lie together: its first row is where its owner is first met.
        first = torch.searchsorted(owners, owners)
        position = torch.arange(len(owners), device=owners.device) - first
        self._mask = watched & (position < MOST_TOKENS)

    def see(self, chunk: ChunkView, teacher: Float[Tensor, "c k"], divergence: Float[Tensor, " c"]) -> None:
        """Values of one chunk: `divergence` is the reverse KL on the support and the tail bucket."""
        mask = self._mask[chunk.rows]
        if not mask.any():
            return
        ids, width = self.batch.ids[chunk.rows][mask], min(LIKELIEST, teacher.shape[1])
        tops: list[Tensor] = []
        for logprobs in (chunk.logprobs[mask], teacher[mask]):
            values, places = logprobs.topk(width, dim=-1)
            tops += [ids.gather(-1, places), values]
        owners = self.batch.owners[chunk.rows][mask]
        self._seen.append(tuple(column.cpu() for column in (owners, chunk.sampled[mask], divergence[mask], *tops)))

    def columns(self) -> dict[str, tuple[Tensor, ...]]:
        """Sample id -> log-probs of the student ``[n]``, KL ``[n]``, then ids and log-probs ``[n, 3]`` of what the
        student, and what the teacher, finds likeliest on the support.
        """
        if not self._seen:
            return {}
        owners, *columns = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        return {
            self.batch.sample_ids[owner]: tuple(column[owners == owner] for column in columns) for owner in self.owners
        }


class TokenKeeper:
    """The answers of one step, on one rank, whose tokens are kept: at most `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._begin_step()

    def _begin_step(self) -> None:
        self._first: list[str] = []
        self._columns: dict[str, tuple[Tensor, ...]] = {}
        self._scored: dict[str, ScoredTrajectory] = {}

    def watch(self, batch: TrainingBatch) -> TokenWatch | None:
        """What to watch of a micro-batch; None where all of its answers come behind the ones that are kept."""
        self._first = first_places([*self._first, *batch.sample_ids], self._most)
        owners = [index for index, sample in enumerate(batch.sample_ids) if sample in self._first]
        return TokenWatch(batch, owners) if owners else None

    def keep(self, watch: TokenWatch) -> None:
        """Take over what was seen."""
        self._columns |= watch.columns()
        self._columns = {sample: self._columns[sample] for sample in self._first if sample in self._columns}

    def describe(self, scored: Iterable[ScoredTrajectory]) -> None:
        """Say what the watched answers were; the others are left alone."""
        self._scored |= {one.trajectory.sample_id: one for one in scored if one.trajectory.sample_id in self._columns}
        self._scored = {sample: one for sample, one in self._scored.items() if sample in self._columns}

    def records(self, loss: LossConfig) -> tuple[TokenRecord, ...]:
        """The step's records, and begin anew."""
        found = tuple(
            record_tokens(
                self._scored[sample],
                counted_tokens(self._scored[sample].trajectory, loss),
                *(column.numpy() for column in columns),
            )
            for sample, columns in self._columns.items()
        )
        self._begin_step()
        return found
