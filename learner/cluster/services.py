"""The actors of one run: starts them together, passes the loop's calls on, stops them on every way out.

This folder knows the other services. It holds actor handles and object references, never tensors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from common.async_utils import all_of, value_of, within
from common.config.model import Config
from common.protocol.schema import Context, Prompt, Sample, Sampling, TokenSequence, as_ids
from common.protocol.scoring import ScorerFactory
from common.telemetry.trace import TraceSpan
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest
from learner.cluster.clocks import clock_warning, measure_clocks, other_nodes
from learner.cluster.placement import Placement, cluster_gpus, draining_nodes, outside_options, unused_gpus
from learner.cluster.rank import LearnerRank
from learner.cluster.teachers import START_TIMEOUT_S, Teachers
from learner.errors import SaveError, ServiceLost
from learner.trainer.reports import LearnerInfo, PrepareReport, StepReport
from rollout_workers.actor import (
    GROUPS,
    Output,
    RolloutSummary,
    RolloutWorker,
    ScoreSummary,
    TextAnswer,
    WorkerInfo,
)
from rollout_workers.environments.playing import EpisodeSummary, Played
from rollout_workers.pool.failures import ACTOR_LOST, short
from rollout_workers.pool.pool import PoolError, Worker, WorkerPool

__all__ = ["ACTOR_LOST", "Arrays", "EpisodeSummary", "PoolError", "Prepared", "Services", "Worker", "short"]

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
RANK_ANSWERS_S = 30.0
"""Ray reports a dead rank within this time; a rank that is silent for longer is busy."""
SYNC_GRACE_S = 30.0
"""Added to the weight group's time limit, so that its error, which says more, comes first."""
Arrays = list[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rollout after a pass of the learner: its reference, the agreement of the top-k ids, the span of the pass."""

    item: Any
    agreement: float | None
    span: TraceSpan


@dataclass
class Services:
    """Handles of a run's actors. It begins without any; start those that are needed, and always `close` it."""

    config: Config
    pool: WorkerPool = field(init=False)
    group: list[Worker] = field(default_factory=list)
    """Workers in the weight group, in rank order."""
    ranks: list[Any] = field(default_factory=list)
    placement: Placement = field(init=False)
    teachers: Teachers = field(init=False)
    learner_info: LearnerInfo | None = None
    worker_info: WorkerInfo | None = None
    manifest: SyncManifest | None = None

    def __post_init__(self) -> None:
        rollout = self.config.rollout
        self.placement = Placement([])
        self.teachers = Teachers(self.config)
        self.pool = WorkerPool(
            max_in_flight=rollout.concurrency, max_restarts=rollout.max_restarts, start_timeout_s=START_TIMEOUT_S
        )

    # --- start and stop ---------------------------------------------------------------------------------------------

    def reserve(self, *, workers_only: bool = False, placement_timeout_s: float = 0.0) -> str | None:
        """Reserve GPUs for all actors, or for the workers, before any of them starts. Returns a warning if the cluster
        has GPUs and some actors use none. Raises PlacementError if the GPUs are not free within the longer of
        `placement_timeout_s` and ``run.placement_timeout_s``.
        """
        placement_timeout_s = max(placement_timeout_s, self.config.run.placement_timeout_s)
        self.placement = Placement.reserve(
            self.config, workers_only=workers_only, placement_timeout_s=placement_timeout_s
        )
        return unused_gpus(self.config, cluster_gpus(), workers_only=workers_only)

    async def start_workers(self, model: str, scorer: ScorerFactory | None, count: int) -> None:
        """Place `count` rollout workers and wait until their engines answer."""
        rollout = self.config.rollout
        config = self.config.model_copy(update={"context": self.config.context.inline()})
        actor = ray.remote(concurrency_groups=GROUPS)(RolloutWorker)

        def make(number: int, slot: int) -> Any:
            return actor.options(
                **(self.placement.options(f"worker {slot}") if slot < rollout.workers else outside_options(rollout)),
                max_concurrency=rollout.concurrency + 1,  # one more for a rollout that is being cancelled
            ).remote(model, config, scorer, number=number, max_logprobs=self.config.loss.top_k)

        self.worker_info = await within(START_TIMEOUT_S, self.pool.start(make, count))

    async def clock_warning(self) -> str | None:
        """Measure the clocks of the other nodes; returns a line if one is off."""
        return clock_warning(await measure_clocks(other_nodes()))

    def invite_workers(self) -> None:
        """Ask for workers beyond ``rollout.workers``, up to ``rollout.max_workers``; they join when there is room."""
        rollout = self.config.rollout
        self.pool.invite(range(rollout.workers, rollout.max_workers or rollout.workers))

    def leave_draining_nodes(self) -> None:
        """Stop the extra workers on nodes that Ray is about to remove; call it between steps."""
        if not self.pool.nodes:
            return
        draining = draining_nodes()
        for worker in (*self.pool.members, *self.pool.ready):
            if worker.extra and self.pool.nodes[worker.number] in draining:
                self.pool.lose(worker, "its node is being drained")

    def begin_ranks(self) -> list[Any]:
        """Place the learner's ranks; returns what `wait_ranks` waits for."""
        learner = self.config.learner
        actor = ray.remote(LearnerRank)
        self.ranks = [
            actor.options(**self.placement.options(f"rank {rank}")).remote(rank, learner.ranks, self.config)
            for rank in range(learner.ranks)
        ]
        host, port = ray.get(self.ranks[0].address.remote(), timeout=START_TIMEOUT_S)
        trial = str((self.config.run.path / "checkpoint.trial").absolute())
        started = [rank.setup.remote(host, port) for rank in self.ranks]
        return [*started, *(rank.try_save.remote(trial) for rank in self.ranks)]

    async def wait_ranks(self, started: Sequence[Any]) -> None:
        """Wait until DeepSpeed runs on all ranks, the learner holds its weights, and an export has been tried.

        Raises SaveError if that export failed.
        """
        setups, trials = started[: len(self.ranks)], started[len(self.ranks) :]
        self.learner_info = (await within(START_TIMEOUT_S, all_of(setups)))[0]
        async with self._saving():
            await all_of(trials)
        self.manifest = SyncManifest(tensors=self.learner_info.tensors, bucket_bytes=self.config.sync.bucket_bytes)

    @property
    def packed(self) -> bool:
        """True if the ranks compute sequences end to end, so that no padding counts."""
        return self.learner_info is not None and self.learner_info.packed

    async def check_ranks(self) -> None:
        """Raise ServiceLost if a rank of the learner is dead. Call it after a failure: ranks compute together, and when
        one dies, the error comes from another rank and does not name it.
        """

        async def check(index: int, rank: Any) -> None:
            try:
                await within(RANK_ANSWERS_S, rank.address.remote())
            except ACTOR_LOST as error:
                raise ServiceLost(f"rank {index} of {len(self.ranks)} of the learner died: {short(error)}") from error
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.debug("rank %d lives, it is busy or failed by itself: %s", index, error)

        await asyncio.gather(*(check(index, rank) for index, rank in enumerate(self.ranks)))

    async def give_contexts(self, contexts: Mapping[str, Context]) -> None:
        """Hand the contexts to the learner, which scores by itself with ``teacher.kind: base``."""
        await all_of([rank.take_contexts.remote(dict(contexts)) for rank in self.ranks])

    async def open_sync(self, workers: Sequence[Worker]) -> None:
        """Form the weight group anew: rank 0 sends, each of `workers` and live teachers receives at its rank offset."""
        size = self.config.rollout.tensor_parallel_size
        self.group = list(workers)
        receivers = self.teachers.receivers
        world = 1 + size * len(self.group) + len(receivers)
        host, port = await self.ranks[0].address.remote()
        joined = [self.ranks[0].open_sync.remote(host, port, world)]
        for index, worker in enumerate(self.group):
            joined.append(worker.handle.join_sync.remote(host, port, 1 + index * size, world))
        for index, teacher in enumerate(receivers):
            joined.append(teacher.handle.join_sync.remote(host, port, 1 + len(self.group) * size + index, world))
        try:
            await within(self.config.sync.timeout_s + SYNC_GRACE_S, all_of(joined))
        except TimeoutError as error:
            raise SyncError(
                f"the weight group of {world} members did not form within {self.config.sync.timeout_s:.0f} s "
                "(sync.timeout_s)"
            ) from error

    async def admit_replacements(self) -> None:
        """Admit replacements with the weights they started with, for workers that no learner publishes to.

        Runs until cancelled.
        """
        while True:
            await self.pool.only_replacements()
            for worker in self.pool.ready:
                self.pool.admit(worker)

    def close_workers(self) -> None:
        """Stop the engines and free their devices."""
        handles = self.pool.handles()
        self.pool.close()
        self._stop(handles, "close")
        self.group = []

    def close(self) -> None:
        """Stop everything: ask first, then kill; never raises."""
        self.close_workers()
        self._stop(self.ranks, "close")
        self.ranks = []
        self._stop(self.teachers.handles(), "stop")
        self.teachers = Teachers(self.config)
        self.placement.release()

    @staticmethod
    def _stop(actors: Sequence[Any], method: str) -> None:
        stopping = []
        for actor in actors:
            try:
                stopping.append(getattr(actor, method).remote())
            except ray.exceptions.RayError as error:
                log.debug("actor is gone already: %s", error)
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)

    # --- rollouts ---------------------------------------------------------------------------------------------------

    async def rollout(
        self, sample: Sample, output: Output = "trajectory", *, in_context: bool = False
    ) -> tuple[RolloutSummary, Any]:
        """(summary, reference to what `output` names) of one answer or episode (`RolloutWorker.rollout`)."""
        return await self.pool.run(
            sample.prompt.row_id, sample.max_tokens, lambda worker: worker.rollout.remote(sample, output, in_context)
        )

    async def score(self, sample: Sample, item: Any) -> tuple[ScoreSummary, Any]:
        """(summary, reference to the scored trajectory) of an unscored one: a reference, or the trajectory itself."""
        return await self.pool.run(sample.prompt.row_id, sample.max_tokens, lambda worker: worker.score.remote(item))

    async def generate(self, requests: Sequence[tuple[Sequence[int], Sampling]]) -> list[TextAnswer]:
        """Answers to token prompts, in their order."""
        names = (f"generate-{time.monotonic_ns()}-{index}" for index in range(len(requests)))
        return await self._texts(
            [
                Sample(0, 0, name, Prompt(name, as_ids(ids), as_ids(ids), None), sampling)
                for name, (ids, sampling) in zip(names, requests, strict=True)
            ]
        )

    async def play(self, games: Sequence[tuple[Prompt, Sampling]], *, in_context: bool) -> list[Played]:
        """Games played to their end, in their order; `in_context`: by a student that sees the context."""
        names = (f"play-{time.monotonic_ns()}-{index}" for index in range(len(games)))
        samples = [Sample(0, 0, name, *game) for name, game in zip(names, games, strict=True)]
        return await self._texts(samples, in_context=in_context)

    async def _texts(self, samples: Sequence[Sample], *, in_context: bool = False) -> list[Any]:
        async def one(sample: Sample) -> Any:
            _, text = await self.rollout(sample, "text", in_context=in_context)
            return await value_of(text)

        return list(await asyncio.gather(*map(one, samples)))

    # --- passes of the learner over unscored answers ----------------------------------------------------------------

    def prepare(self, group: Sequence[Sequence[Any]]) -> Coroutine[Any, Any, list[Prepared]]:
        """Run the learner's pass over unscored rollouts (`LearnerRank.prepare`), a share of `group` by each rank.

        All ranks are called before this returns; the coroutine gives the results in the order of `group`.
        """
        assert self.learner_info is not None
        collective = self.learner_info.zero_stage == 3  # ranks without a share then take part all the same
        passes = [
            (index, *_prepare(rank, share))
            for index, (rank, share) in enumerate(zip(self.ranks, group, strict=True))
            if share or collective
        ]

        async def prepared() -> list[Prepared]:
            results: list[Prepared] = []
            for rank, pending, items in passes:
                report: PrepareReport = await pending
                if not items:
                    continue
                span = TraceSpan(self._pass_stage, f"rank {rank}", report.started, report.ended)
                results += (Prepared(*pair, span) for pair in zip(items, report.agreements, strict=True))
            return results

        return prepared()

    @property
    def _pass_stage(self) -> str:
        return "score" if self.config.teacher.kind == "base" else "topk"

    # --- the learner ------------------------------------------------------------------------------------------------

    def accumulate(self, group: Sequence[Sequence[tuple[Any, float, str]]]) -> list[Any]:
        """Give every rank its micro-batch of `group`: references to scored trajectories, each with the advantage of its
        reward and the set of its row, possibly none.
        """
        return [
            rank.accumulate.remote([more for _, *more in items], *(ref for ref, *_ in items))
            for rank, items in zip(self.ranks, group, strict=True)
        ]

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        """Run the optimiser step on all ranks; gradients are divided by the step's global counts."""
        return list(await all_of([rank.finish_step.remote(tokens, sequences) for rank in self.ranks]))

    async def publish(self, version: int) -> Any:
        """Send the learner's weights to the weight group as `version`; returns rank 0's report.

        Raises the error of a member that did not get all weights, and ServiceLost for a teacher, which then holds a
        mixture of versions. Dead workers are removed from the pool. A living worker with a mixture stays: it answers
        nothing before it has received a whole version. After a failure the next sync needs `open_sync`.
        """
        teachers = self.teachers.receivers
        members = (*(worker.handle for worker in self.group), *(teacher.handle for teacher in teachers))
        calls = [rank.publish.remote() for rank in self.ranks]
        calls += [member.receive_weights.remote(self.manifest, version) for member in members]
        # Every collective in it has its own time limit.
        results = iter(await asyncio.gather(*map(value_of, calls), return_exceptions=True))
        sent = [next(results) for _ in self.ranks]
        failures = [result for result in sent if isinstance(result, BaseException)]
        for worker in self.group:
            result = next(results)
            if isinstance(result, BaseException):
                failures.append(result)
                if isinstance(result, ACTOR_LOST):
                    self.pool.lose(worker, f"weights of version {version} did not arrive: {short(result)}")
        for teacher in teachers:
            result = next(results)
            if isinstance(result, BaseException):
                raise ServiceLost(
                    f"teacher {teacher.name!r} did not get all weights of version {version}: {result}"
                ) from result
        if failures:
            self.group = []
            raise failures[0]
        return sent[0]

    async def probe_engines(self, workers: Sequence[Worker], sequences: Sequence[TokenSequence]) -> list[Arrays]:
        """Log-probs of the response tokens of fixed sequences, from each engine."""
        return list(await all_of([worker.handle.probe.remote(list(sequences)) for worker in workers]))

    async def probe_learner(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> Arrays:
        """Log-probs of the response tokens of fixed sequences, from the learner; each rank computes a share."""
        return await self._by_rank(lambda rank, share: rank.logprobs.remote(share, temperature), sequences)

    async def experts(
        self, workers: Sequence[Worker], sequences: Sequence[TokenSequence]
    ) -> tuple[list[list[NDArray[Any]]], list[dict[int, NDArray[Any]]]]:
        """Experts that predict the response tokens of fixed sequences, from each engine and from the learner.

        See `learner.loop.expert_mismatch` for their shapes.
        """
        engines = await all_of([worker.handle.experts.remote(list(sequences)) for worker in workers])
        return list(engines), await self._by_rank(lambda rank, share: rank.experts.remote(share), sequences)

    async def _by_rank(self, call: Callable[[Any, Sequence[TokenSequence]], Any], sequences: Any) -> list[Any]:
        """`call` each rank with a share of `sequences`; the results in the order of `sequences`."""
        count = len(self.ranks)
        shares = await all_of([call(rank, sequences[n::count]) for n, rank in enumerate(self.ranks)])
        return [shares[index % count][index // count] for index in range(len(sequences))]

    async def weight_version(self) -> int:
        """Number of optimiser steps in the learner's weights."""
        return int(await value_of(self.ranks[0].weight_version.remote()))

    async def save(self, folder: str) -> None:
        """Export the learner's weights as a Hugging Face folder. Raises SaveError; training can go on after it."""
        async with self._saving():
            await all_of([rank.save.remote(folder) for rank in self.ranks])

    @asynccontextmanager
    async def _saving(self) -> AsyncIterator[None]:
        """Turn a rank's OSError into a SaveError, or into a ServiceLost if another rank's death made it fail."""
        try:
            yield
        except OSError as error:
            await self.check_ranks()
            raise SaveError(short(error)) from None

    async def save_state(self, folder: str, *, drop_step: bool = False) -> None:
        """Write the resumable state: every rank's part, and the weights of teachers that hold others.

        `drop_step` leaves out the gradients of a step that has begun; the run must end after it.
        """
        await all_of([rank.save_state.remote(folder, drop_step) for rank in self.ranks])
        await self.teachers.save_state(folder)

    async def load_state(self, folder: str) -> None:
        """Load what `save_state` wrote: weights, optimiser, counters."""
        await all_of([rank.load_state.remote(folder) for rank in self.ranks])
        await self.teachers.load_state(folder)


def _prepare(rank: Any, items: Sequence[Any]) -> tuple[Any, list[Any]]:
    """(reference to the report, references to the rollouts); without `items` the first is not a report."""
    if not items:
        return rank.prepare.remote(), []
    report, *prepared = rank.prepare.options(num_returns=len(items) + 1).remote(*items)
    return report, prepared
