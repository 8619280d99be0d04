"""Publishes every version of the weights to every engine, and checks that they arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import ray

from common.config.model import Config
from common.protocol.schema import Prompt, Sampling, TokenSequence, as_ids
from common.telemetry.trace import TraceSpan
from common.weight_sync.collective import SyncError
from learner.cluster.services import Arrays, Services, Worker
from learner.loop.expert_mismatch import expert_mismatch
from learner.loop.parity import ParityGate, ParityReport, parity_bounds

MAX_ATTEMPTS = 3
"""Syncs of one version; each leaves out the workers that died in the one before."""


class WeightPublisher:
    """Publishes versions to the pool's workers, and admits those that waited for the current weights."""

    def __init__(self, config: Config, services: Services, status: Callable[[str], None]) -> None:
        self._config = config
        self._services = services
        self._status = status
        self._probe: list[TokenSequence] = []
        self._probe_prompts: Sequence[Prompt] = []
        self._learner_at_0: Arrays = []
        self._gates: dict[int, ParityGate] = {}
        self._lock = asyncio.Lock()
        self._spans: list[TraceSpan] = []
        self.expert_mismatch: dict[str, float] = {}
        """Metrics of the last sync (`learner.loop.expert_mismatch`), of the worst engine in each layer."""

    async def begin(self, prompts: Sequence[Prompt]) -> ParityReport:
        """Choose the probe (the engine's answers at version 0) and measure each engine's distance from the learner.

        Returns the worst pair's report; raises ParityError.
        """
        sync, services = self._config.sync, self._services
        assert services.worker_info is not None
        chosen = prompts[: sync.probe_prompts]
        # Scoring takes the whole sequence as a prompt, and an engine needs room for one more token.
        room = services.worker_info.max_sequence_tokens - 1 - max(len(prompt.student_ids) for prompt in chosen)
        sampling = Sampling(max_tokens=min(sync.probe_tokens, room), temperature=1.0, seed=self._config.run.seed)
        answers = await services.generate([(prompt.student_ids.tolist(), sampling) for prompt in chosen])
        self._probe_prompts = chosen
        self._probe = [
            TokenSequence(prompt_ids=prompt.student_ids, response_ids=as_ids(answer.ids))
            for prompt, answer in zip(chosen, answers, strict=True)
        ]
        self._learner_at_0 = await services.probe_learner(self._probe)
        await services.open_sync(services.pool.members)
        return _worst(await self._begin_gates(services.pool.members))

    @property
    def probe(self) -> list[tuple[Prompt, TokenSequence]]:
        """The rows of the probe, and each as a sequence of the student; empty before `begin`."""
        return list(zip(self._probe_prompts, self._probe, strict=True))

    async def publish(self, version: int, *, again: bool = False) -> ParityReport:
        """Send the learner's weights to every engine as `version` and check parity; returns the worst report.

        `again` marks in the trace that a step has published the version before, so that it ends no step.
        If workers die meanwhile, it tries again with the others and with those that became ready. Raises ParityError,
        and SyncError if no worker died: then another try would change nothing.
        """
        async with self._lock:
            for _ in range(MAX_ATTEMPTS - 1):
                failures = self._services.pool.failures
                try:
                    return await self._publish(version, again)
                except (SyncError, ray.exceptions.RayError) as error:
                    await self._services.pool.check_health()
                    if self._services.pool.failures == failures:
                        raise
                    self._status(f"weight sync of version {version} again: {error}")
            return await self._publish(version, again)

    def take_spans(self) -> list[TraceSpan]:
        """Spans of the syncs since the last call, for the trace."""
        spans, self._spans = self._spans, []
        return spans

    async def _publish(self, version: int, again: bool) -> ParityReport:
        services = self._services
        if not services.pool.members:
            await services.pool.next_ready()
        workers = [*services.pool.members, *services.pool.ready]  # a snapshot: more may become ready meanwhile
        if services.group != workers:
            await self._begin_gates(workers)
            await services.open_sync(workers)
        started = time.time()
        await services.publish(version)
        published = time.time()
        engines, learner = await asyncio.gather(
            services.probe_engines(services.group, self._probe), services.probe_learner(self._probe)
        )
        reports = [
            self._gates[worker.number].check(version, engine, learner)
            for worker, engine in zip(services.group, engines, strict=True)
        ]
        if self._config.sync.expert_mismatch:
            chosen, by_learner = await services.experts(services.group, self._probe)
            found = [expert_mismatch(by_engine, by_learner) for by_engine in chosen]
            self.expert_mismatch = {name: max(one[name] for one in found) for name in found[0]}
        for stage, start, end in (("sync", started, published), ("parity", published, time.time())):
            self._spans.append(
                TraceSpan(stage, "controller", start, end, {"version_again" if again else "version": version})
            )
        for worker in set(services.pool.ready) & set(services.group):
            services.pool.admit(worker)
        return _worst(reports)

    async def _begin_gates(self, workers: Sequence[Worker]) -> list[ParityReport]:
        """Gates for new `workers`, whose engines hold the initial weights. Raises ParityError."""
        info = self._services.learner_info
        assert info is not None
        bounds = parity_bounds(self._config.sync, info.dtype)
        new = [worker for worker in workers if worker.number not in self._gates]
        reports = []
        for worker, engine in zip(new, await self._services.probe_engines(new, self._probe), strict=True):
            gate = ParityGate(bounds)
            reports.append(gate.begin(engine, self._learner_at_0))
            self._gates[worker.number] = gate
        return reports


def _worst(reports: Sequence[ParityReport]) -> ParityReport:
    return max(reports, key=lambda report: report.rms_nats)
