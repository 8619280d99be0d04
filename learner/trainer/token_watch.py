"""Capture of a few trajectories of each step token by token, from values that the loss computes anyway."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from common.config.model import LossConfig
from common.protocol.schema import ScoredTrajectory
from learner.trainer.micro_batch import MicroBatch, counted_tokens
from learner.trainer.output_layer import ChunkView
from learner.trainer.token_records import MAX_TOKENS, TOP_TOKENS, TokenRecord, choose_samples, record_tokens


@dataclass
class TokenWatch:
    """Collects the values of the watched samples of one micro-batch, chunk by chunk."""

    batch: MicroBatch
    watched: Sequence[int]
    """Indices of the watched samples in the micro-batch."""
    _mask: Tensor = field(init=False)
    _chunks: list[tuple[Tensor, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sample_index = self.batch.sample_index
        watched = torch.isin(sample_index, torch.tensor(self.watched, device=sample_index.device))
        # The rows of a sample are contiguous, so searchsorted finds its first row.
        first = torch.searchsorted(sample_index, sample_index)
        position = torch.arange(len(sample_index), device=sample_index.device) - first
        self._mask = watched & (position < MAX_TOKENS)

    def add_chunk(self, chunk: ChunkView, teacher: Float[Tensor, "c k"], kl: Float[Tensor, " c"]) -> None:
        """Collect one chunk; `teacher` holds log-probs, `kl` the reverse KL on the support and the tail bucket."""
        mask = self._mask[chunk.rows]
        if not mask.any():
            return
        ids, width = self.batch.ids[chunk.rows][mask], min(TOP_TOKENS, teacher.shape[1])
        tops: list[Tensor] = []
        for logprobs in (chunk.logprobs[mask], teacher[mask]):
            values, columns = logprobs.topk(width, dim=-1)
            tops += [ids.gather(-1, columns), values]
        sample_index = self.batch.sample_index[chunk.rows][mask]
        self._chunks.append(tuple(column.cpu() for column in (sample_index, chunk.sampled[mask], kl[mask], *tops)))

    def columns(self) -> dict[str, tuple[Tensor, ...]]:
        """Map each watched sample to the tensors that `record_tokens` takes after the mask, in its order."""
        if not self._chunks:
            return {}
        sample_index, *columns = (torch.cat(parts) for parts in zip(*self._chunks, strict=True))
        return {
            self.batch.sample_ids[index]: tuple(column[sample_index == index] for column in columns)
            for index in self.watched
        }


class TokenRecorder:
    """Records the tokens of at most `max_samples` samples of each step, on one rank."""

    def __init__(self, max_samples: int) -> None:
        self._max_samples = max_samples
        self._begin_step()

    def _begin_step(self) -> None:
        self._chosen: list[str] = []
        self._columns: dict[str, tuple[Tensor, ...]] = {}
        self._scored: dict[str, ScoredTrajectory] = {}

    def watch(self, batch: MicroBatch) -> TokenWatch | None:
        """Return a watch on the chosen samples of `batch`; None if the step has chosen none of them."""
        self._chosen = choose_samples([*self._chosen, *batch.sample_ids], self._max_samples)
        watched = [index for index, sample in enumerate(batch.sample_ids) if sample in self._chosen]
        return TokenWatch(batch, watched) if watched else None

    def keep(self, watch: TokenWatch) -> None:
        """Keep the collected values of the samples that are still chosen."""
        self._columns |= watch.columns()
        self._columns = {sample: self._columns[sample] for sample in self._chosen if sample in self._columns}

    def add_trajectories(self, scored: Iterable[ScoredTrajectory]) -> None:
        """Keep the trajectories of the chosen samples; `records` needs them."""
        self._scored |= {one.trajectory.sample_id: one for one in scored}
        self._scored = {sample: one for sample, one in self._scored.items() if sample in self._columns}

    def records(self, loss: LossConfig) -> tuple[TokenRecord, ...]:
        """Return the step's records and start the next step."""
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
