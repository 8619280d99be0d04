"""Forward passes of the learner without gradients: response log-probs, top-k ids, scores of the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.model import LearnerConfig
from common.protocol.schema import Ids, ItemScore, TokenSequence, Trajectory, as_ids
from learner.trainer.batch_layout import Layout, SequenceBatch
from learner.trainer.lora import without_adapters
from learner.trainer.policy import Policy

R = TypeVar("R")

FILLER = TokenSequence(as_ids([0]), as_ids([0]))
"""Sequence of a pass that only joins the collectives of other ranks' passes."""


class PolicyInference:
    """Runs the current weights in micro-batches of ``learner.micro_batch_tokens``.

    Under ZeRO-3 every method is a collective: all ranks call it, each with its share of the work, possibly none.
    """

    def __init__(
        self,
        policy: Policy,
        layout: Layout,
        learner: LearnerConfig,
        loss_temperature: float,
        device: torch.device,
        agreed_passes: Callable[[int], int],
    ) -> None:
        """`agreed_passes` maps this rank's number of passes to the number that it must make."""
        self._policy = policy
        self._layout = layout
        self._device = device
        self._budget_tokens = learner.micro_batch_tokens
        self._loss_temperature = loss_temperature
        self._has_base = learner.lora is not None
        self._agreed_passes = agreed_passes

    def logprobs(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """Return the log-probs of the response tokens, one ``[T]`` array per sequence."""
        return self._run(sequences, lambda batch, _: _split(self._policy.response_logprobs(batch, temperature), batch))

    def topk(self, sequences: Sequence[TokenSequence], k: int) -> list[Ids]:
        """Return the k most likely ids at every response position, best first, one ``[T, k]`` array per sequence."""
        found = self._run(sequences, lambda batch, _: _split(self._policy.topk(batch, k), batch))
        return [ids.astype(np.uint32) for ids in found]

    def experts(self, sequences: Sequence[TokenSequence]) -> list[dict[int, NDArray[np.int64]]]:
        """Return the experts that predict the response tokens: for each sequence ``[T, k]`` by layer."""

        def split(batch: SequenceBatch, _: Sequence[int]) -> Sequence[dict[int, NDArray[np.int64]]]:
            layers = {layer: _split(ids, batch) for layer, ids in self._policy.experts(batch).items()}
            return [{layer: parts[n] for layer, parts in layers.items()} for n in range(len(batch.lengths))]

        return self._run(sequences, split)

    def score_with_base(self, items: Sequence[tuple[Trajectory, Ids]]) -> list[ItemScore]:
        """Score each (trajectory, teacher prompt) with the base model, adapters off, as a teacher server would.

        The teacher prompt includes the context; scores are at the top-k ids of the trajectory. Raises ValueError
        without LoRA: then there is no base model.
        """
        if not self._has_base:
            raise ValueError(
                "score_with_base needs learner.lora: without adapters there is no base model to score with"
            )

        def scores(batch: SequenceBatch, indices: Sequence[int]) -> Sequence[ItemScore]:
            supports = [items[index][0].topk_ids for index in indices]
            return self._policy.scores(batch, supports, self._loss_temperature)

        with without_adapters(self._policy.model):
            return self._run([TokenSequence(prompt, t.response_ids) for t, prompt in items], scores)

    def _run(
        self,
        sequences: Sequence[TokenSequence],
        compute: Callable[[SequenceBatch, Sequence[int]], Sequence[R]],
    ) -> list[R]:
        """Apply `compute` to micro-batches and the indices of their sequences; return its results, one per sequence, in
        the order of `sequences`.

        Passes without a result follow until this rank has made as many as the others.
        """
        results: dict[int, R] = {}
        plan = self._layout.plan([len(s.prompt_ids) + len(s.response_ids) for s in sequences], self._budget_tokens)
        missing = self._agreed_passes(len(plan)) - len(plan)
        for indices in plan:
            batch = self._lay_out([sequences[index] for index in indices])
            results.update(zip(indices, compute(batch, indices), strict=True))
        for _ in range(missing):
            self._policy.response_logprobs(self._lay_out([FILLER]), 1.0)
        return [results[index] for index in range(len(sequences))]

    def _lay_out(self, sequences: Sequence[TokenSequence]) -> SequenceBatch:
        return self._layout.lay_out(sequences).to(self._device)


def _split(values: torch.Tensor, batch: SequenceBatch) -> list[NDArray[Any]]:
    """Split ``[R, ...]`` values of the response tokens into one array per sequence."""
    return np.split(values.cpu().numpy(), np.cumsum(batch.lengths)[:-1])
