"""One rank of the learner as a Ray actor: starts the trainer's engine on its node and passes calls on."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.config.model import Config
from common.data.rendering import teacher_sequence
from common.devices import see_only
from common.network import use_interface_of
from common.protocol.schema import Context, Ids, ScoredTrajectory, TokenSequence, Trajectory, as_ids
from common.weight_sync.manifest import SyncManifest
from learner.trainer.distributed import free_port, join_ranks, leave_ranks
from learner.trainer.reports import AccumulateReport, LearnerInfo, PrepareReport, StepReport

if TYPE_CHECKING:
    from torch import Tensor

    from learner.publishing.packer import SendReport
    from learner.publishing.sender import Sender
    from learner.trainer.engine import LearnerEngine

log = logging.getLogger(__name__)


def topk_agreement(first: Ids, second: Ids) -> float:
    """Mean share of common ids of two top-k supports, ``[T, k]`` each; 1 for equal sets."""
    common = [len(np.intersect1d(a, b)) for a, b in zip(first, second, strict=True)]
    return float(np.mean(common)) / first.shape[1]


class LearnerRank:
    """Make one per rank with ``ray.remote(LearnerRank)``; get rank 0's `address`, then call `setup` on all."""

    def __init__(self, rank: int, world_size: int, config: Config) -> None:
        import ray

        if ray.is_initialized():
            see_only(ray.get_gpu_ids())
        self._rank = rank
        self._world_size = world_size
        self._config = config
        self._contexts: dict[str, Context] = {}
        self._engine: LearnerEngine | None = None
        self._sender: Sender | None = None

    def address(self) -> tuple[str, int]:
        """This node's address and a free port, for the rendezvous of the ranks or of the weight group."""
        import ray.util

        return ray.util.get_node_ip_address(), free_port()

    def setup(self, host: str, port: int) -> LearnerInfo:
        """Join the other ranks at rank 0's address and start DeepSpeed; blocks until all ranks have joined."""
        import ray.util

        from learner.trainer.engine import LearnerEngine
        from learner.trainer.policy import device_of

        use_interface_of(ray.util.get_node_ip_address())
        timeout_s = self._config.learner.collective_timeout_s
        join_ranks(self._rank, self._world_size, host, port, device_of(self._config.learner), timeout_s)
        self._engine = LearnerEngine(self._config)
        return self._engine.info()

    def accumulate(
        self, more: Sequence[tuple[float, str]], *scored: ScoredTrajectory | Sequence[ScoredTrajectory]
    ) -> AccumulateReport:
        """Add the gradients of a micro-batch, given as object references, possibly none. An episode is a list.

        `more` holds (advantage, name of the row's set) per item; the advantage is 0 without a reward.
        """
        return self._running.accumulate(
            [
                replace(one, advantage=advantage, data_set=data_set)
                for (advantage, data_set), item in zip(more, scored, strict=True)
                for one in ((item,) if isinstance(item, ScoredTrajectory) else item)
            ]
        )

    def finish_step(self, tokens: int, sequences: int) -> StepReport:
        """Run the optimiser step; gradients are divided by the global counts."""
        return self._running.finish_step(tokens, sequences)

    def logprobs(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[NDArray[np.float32]]:
        """log-probs of fixed responses, one ``[T]`` array each: this rank's share of the learner's side of the parity
        probe. Under ZeRO-3 a collective, as are `experts`, `topk` and `prepare`.
        """
        return self._running.inference.logprobs(sequences, temperature)

    def experts(self, sequences: Sequence[TokenSequence]) -> list[dict[int, NDArray[np.int64]]]:
        """The experts that predict the response tokens: for each sequence ``[T, k]`` by layer."""
        return self._running.inference.experts(sequences)

    def topk(self, sequences: Sequence[TokenSequence], k: int) -> list[Ids]:
        """The k most likely ids at every response position, one ``[T, k]`` array each."""
        return self._running.inference.topk(sequences, k)

    def take_contexts(self, contexts: Mapping[str, Context]) -> None:
        """Keep the contexts with which `prepare` scores as the teacher (``teacher.kind: base``)."""
        self._contexts = dict(contexts)

    def prepare(self, *trajectories: Trajectory) -> list[Any]:
        """Add what the learner must compute before training: its top-k ids, or the base model's scores.

        Returns [PrepareReport, *completed trajectories]; call it with ``num_returns=len(trajectories) + 1``.
        """
        started, agreements = time.time(), tuple[float | None, ...]([None] * len(trajectories))
        prepared: Sequence[Any] = trajectories
        if self._config.rollout.topk_from == "learner":
            k = self._config.loss.top_k
            sequences = [TokenSequence(t.prompt.student_ids, t.response_ids) for t in trajectories]
            picked = self._running.inference.topk(sequences, k)
            agreements = tuple(
                topk_agreement(one.topk_ids, ids) if one.topk_ids.shape[1] else None
                for one, ids in zip(trajectories, picked, strict=True)
            )
            prepared = [replace(one, topk_ids=ids) for one, ids in zip(trajectories, picked, strict=True)]
        if self._config.teacher.kind == "base":
            pairs = [(one, as_ids(teacher_sequence(one.prompt, self._contexts))) for one in prepared]
            scores = self._running.inference.score_with_base(pairs)
            prepared = [ScoredTrajectory(one, score, "base", 0) for one, score in zip(prepared, scores, strict=True)]
        return [PrepareReport(agreements, started, time.time()), *prepared]

    def open_sync(self, host: str, port: int, world_size: int) -> None:
        """Open the weight group, leaving the one before; rank 0 is the sender, the other ranks take no part.

        Called again, with a new address, whenever the engines change; the next `publish` then sends all weights.
        """
        if self._rank == 0:
            from learner.publishing.sender import open_sender

            if self._sender is not None:
                self._sender.close()
                self._sender = None
            device = self._running.info().device
            self._sender = open_sender(self._config.sync_in_run, host, port, world_size, device)

    def publish(self) -> SendReport | None:
        """Send the current weights to every engine; None on ranks that only help to gather them.

        Raises SyncError on rank 0 if the sync failed; the ranks can go on after it.
        """
        weights = self._running.named_weights()
        try:
            return self._send(weights) if self._rank == 0 else None
        finally:
            # Gathering is a collective: a rank that stopped half-way would leave the others waiting.
            for _ in weights:
                pass

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> SendReport:
        if self._sender is None:
            raise RuntimeError("publish was called before open_sync")
        engine = self._running
        manifest = SyncManifest(engine.weight_specs(), self._config.sync.bucket_bytes, engine.weight_version)
        return self._sender.send(weights, manifest)

    def weight_version(self) -> int:
        """Number of finished steps."""
        return self._running.weight_version

    def save(self, folder: str) -> None:
        """Export a Hugging Face folder; every rank is called, rank 0 writes."""
        self._running.save(Path(folder))

    def try_save(self, folder: str) -> None:
        """Try to export to `folder`, before the first step; every rank is called, rank 0 writes and removes it."""
        self._running.try_save(Path(folder))

    def save_state(self, folder: str, drop_step: bool = False) -> None:
        """Write this rank's part of the resumable state; every rank is called, with the same arguments."""
        self._running.save_state(Path(folder), drop_step=drop_step)

    def load_state(self, folder: str) -> LearnerInfo:
        """Load what `save_state` wrote; every rank is called, after `setup`."""
        self._running.load_state(Path(folder))
        return self._running.info()

    def close(self) -> None:
        """Leave all groups."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._engine = None
        leave_ranks()

    @property
    def _running(self) -> LearnerEngine:
        if self._engine is None:
            raise RuntimeError("the rank was called before setup")
        return self._engine
