"""Forward passes of the learner without gradients: response log-probs, top-k ids, scores of the base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.model import LearnerConfig
from common.protocol.schema import Ids, ItemScore, TokenSequence, Trajectory
from learner.trainer.batch_layout import Layout, SequenceBatch
from learner.trainer.lora import without_adapters
from learner.trainer.policy import Policy

R = TypeVar("R", bound=np.generic)


class PolicyInference:
    """Runs the current weights in micro-batches of ``learner.micro_batch_tokens``.

    Under ZeRO-3 every method is a collective. Each rank that is called computes the whole request.
    """

    def __init__(
        self, policy: Policy, layout: Layout, learner: LearnerConfig, loss_temperature: float, device: torch.device
    ) -> None:
        self._policy = policy
        self._layout = layout
        self._device = device
        self._budget_tokens = learner.micro_batch_tokens
        self._loss_temperature = loss_temperature
        self._has_base = learner.lora is not None

    def logprobs(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """Return the log-probs of the response tokens, one ``[T]`` array per sequence."""
        return self._run(sequences, lambda batch: self._policy.response_logprobs(batch, temperature).cpu().numpy())

    def topk(self, sequences: Sequence[TokenSequence], k: int) -> list[Ids]:
        """Return the k most likely ids at every response position, best first, one ``[T, k]`` array per sequence."""
        return self._run(sequences, lambda batch: self._policy.topk(batch, k).cpu().numpy().astype(np.uint32))

    def score_with_base(self, items: Sequence[tuple[Trajectory, Ids]]) -> list[ItemScore]:
        """Score each (trajectory, teacher prompt) with the base model, adapters off, as a teacher server would.

        The teacher prompt includes the context; scores are at the top-k ids of the trajectory. Raises ValueError
        without LoRA: then there is no base model.
        """
        if not self._has_base:
            raise ValueError(
                "score_with_base needs learner.lora: without adapters there is no base model to score with"
            )
        results: dict[int, ItemScore] = {}
        lengths = [len(prompt) + len(trajectory.response_ids) for trajectory, prompt in items]
        with without_adapters(self._policy.model):
            for indices in self._layout.plan(lengths, self._budget_tokens):
                chosen = [items[index] for index in indices]
                batch = self._lay_out([TokenSequence(prompt, t.response_ids) for t, prompt in chosen])
                scores = self._policy.scores(batch, [t.topk_ids for t, _ in chosen], self._loss_temperature)
                results.update(zip(indices, scores, strict=True))
        return [results[index] for index in range(len(items))]

    def _run(
        self, sequences: Sequence[TokenSequence], compute: Callable[[SequenceBatch], NDArray[R]]
    ) -> list[NDArray[R]]:
        """Apply `compute` to micro-batches; return one array per sequence, in the order of `sequences`."""
        results: dict[int, NDArray[R]] = {}
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
        for indices in self._layout.plan(lengths, self._budget_tokens):
            batch = self._lay_out([sequences[index] for index in indices])
            parts = np.split(compute(batch), np.cumsum(batch.lengths)[:-1])
            results.update(zip(indices, parts, strict=True))
        return [results[index] for index in range(len(sequences))]

    def _lay_out(self, sequences: Sequence[TokenSequence]) -> SequenceBatch:
        return self._layout.lay_out(sequences).to(self._device)
