"""What the learner reads off its weights as they are, without a gradient: log-probs, top-k ids, the base's scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.model import Config
from common.protocol.schema import Ids, ItemScore, TokenSequence, Trajectory
from learner.trainer.batch_layout import Layout, SequenceBatch
from learner.trainer.lora import without_adapters
from learner.trainer.policy import Policy

R = TypeVar("R", bound=np.generic)


class Reader:
    """Reads in micro-batches of the learner's own size. Under ZeRO-3 every method is a collective; in any case every
    rank that is asked computes all of it.
    """

    def __init__(self, policy: Policy, layout: Layout, config: Config, device: torch.device) -> None:
        self._policy = policy
        self._layout = layout
        self._device = device
        self._budget_tokens = config.learner.micro_batch_tokens
        self._loss_temperature = config.loss.temperature
        self._has_base = config.learner.lora is not None

    def logprobs(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """log-probs of the response tokens under the current weights, one ``[T]`` array per sequence."""
        return self._read(sequences, lambda batch: self._policy.response_logprobs(batch, temperature).cpu().numpy())

    def topk(self, sequences: Sequence[TokenSequence], k: int) -> list[Ids]:
        """The k most likely ids at every response position, best first, one ``[T, k]`` array per sequence.

        For supports that the learner picks: long answers, or answers of an older version.
        """
        return self._read(sequences, lambda batch: self._policy.topk(batch, k).cpu().numpy().astype(np.uint32))

    def score_with_base(self, items: Sequence[tuple[Trajectory, Ids]]) -> list[ItemScore]:
        """What the base model, adapters off, says of answers behind a teacher's prompt (context + prompt): the score of
        each at the answer's own ids, as a teacher server gives it. Raises ValueError without LoRA: there is no base.
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

    def _read(
        self, sequences: Sequence[TokenSequence], read: Callable[[SequenceBatch], NDArray[R]]
    ) -> list[NDArray[R]]:
        """`read` over micro-batches, cut apart again, in the order of `sequences`."""
        results: dict[int, NDArray[R]] = {}
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
        for indices in self._layout.plan(lengths, self._budget_tokens):
            batch = self._lay_out([sequences[index] for index in indices])
            parts = np.split(read(batch), np.cumsum(batch.lengths)[:-1])
            results.update(zip(indices, parts, strict=True))
        return [results[index] for index in range(len(sequences))]

    def _lay_out(self, sequences: Sequence[TokenSequence]) -> SequenceBatch:
        return self._layout.lay_out(sequences).to(self._device)
