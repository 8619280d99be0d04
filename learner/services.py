"""The actors of one run: started together, called by the controller, stopped whatever happens.

The only file that knows the other services. It holds actor handles and object references, never tensors.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from common.config import Config, TeacherServerConfig
from common.schema import Context, Prompt, Sampling, TeacherInfo, TokenSequence
from common.weights import SyncManifest
from learner.rank import LearnerRank
from learner.reports import AccumulateReport, LearnerInfo, StepReport
from rollout_workers.actor import CONTROL, Answer, RolloutWorker, WorkerInfo
from teacher_server.actor import TeacherActor
from teacher_server.client import LOST_AFTER_S, TeacherClient, TeacherScorerFactory, handshake, read_key

log = logging.getLogger(__name__)

START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 30.0
SYNC_GRACE_S = 30.0
"""Beyond the weight group's own limit, so that its error, which says more, comes first."""
OWN_TEACHER_LOST_AFTER_S = 15.0
"""Nobody starts a run's own teacher again: waiting for it is short."""

Arrays = list[NDArray[np.float32]]


@dataclass
class Services:
    """Handles of a run's actors. Make it with an empty set, start what is needed, always `close` it."""

    config: Config
    workers: list[Any] = field(default_factory=list)
    ranks: list[Any] = field(default_factory=list)
    teacher: Any = None
    teacher_info: TeacherInfo | None = None
    teacher_key: str | None = field(default=None, repr=False)
    learner_info: LearnerInfo | None = None
    worker_info: WorkerInfo | None = None
    manifest: SyncManifest | None = None

    # --- start and stop ---------------------------------------------------------------------------------------------

    def begin_teacher(self) -> Any:
        """Place the run's own teacher; the reference resolves to its address. None where `teacher.url` names one."""
        if self.config.teacher.url is not None:
            return None
        section = self.config.teacher.model_copy(update={"model": self.config.teacher_model})
        if self.config.learner.deterministic:
            section = section.model_copy(update={"batch_items": 1})
        options = {"num_cpus": 0, "num_gpus": section.gpus}
        self.teacher_key = secrets.token_urlsafe(32)  # other users of the machine reach the port too
        self.teacher = (
            ray.remote(TeacherActor).options(**options).remote(TeacherServerConfig(teacher=section), self.teacher_key)
        )
        return self.teacher.start.remote()

    def connect_teacher(
        self, started: Any, contexts: Mapping[str, Context], *, tokenizer_fingerprint: str, longest_tokens: int
    ) -> TeacherScorerFactory:
        """Shake hands and hand over the contexts; the factory makes a scorer inside each worker.

        Raises TeacherError where the teacher does not fit the run.
        """
        config = self.config
        url = config.teacher.url or ray.get(started, timeout=START_TIMEOUT_S)
        if config.teacher.key_file is not None and config.teacher.url is not None:
            self.teacher_key = read_key(config.teacher.key_file)
        ca_file = None if config.teacher.ca_file is None else str(config.teacher.ca_file)
        self.teacher_info = asyncio.run(_info(url, config, self.teacher_key, ca_file))
        handshake(
            self.teacher_info,
            tokenizer_fingerprint=tokenizer_fingerprint,
            k=config.loss.top_k,
            mode="at_ids",
            temperature=config.loss.temperature,
            longest_tokens=longest_tokens,
        )
        return TeacherScorerFactory(
            url=url,
            run=config.run.name,
            expected_info=self.teacher_info,
            contexts=tuple(contexts.values()),
            mode="at_ids",
            temperature=config.loss.temperature,
            k=config.loss.top_k,
            timeout_s=config.teacher.request_timeout_s,
            api_key=self.teacher_key,
            ca_file=ca_file,
            lost_after_s=LOST_AFTER_S if config.teacher.url is not None else OWN_TEACHER_LOST_AFTER_S,
        )

    def begin_workers(self, model: str, scorer: TeacherScorerFactory | None, count: int) -> None:
        """Place rollout workers; `wait_workers` waits until their engines answer."""
        rollout = self.config.rollout
        actor = ray.remote(concurrency_groups={CONTROL: 8})(RolloutWorker)
        for _ in range(count):
            self.workers.append(
                actor.options(
                    num_cpus=0,
                    num_gpus=rollout.gpus_per_worker * rollout.tensor_parallel_size,
                    max_concurrency=rollout.concurrency,
                ).remote(model, self.config, scorer, max_logprobs=self.config.loss.top_k)
            )

    def wait_workers(self) -> None:
        """Block until every engine is up."""
        self.worker_info = ray.get([worker.ready.remote() for worker in self.workers], timeout=START_TIMEOUT_S)[0]

    def begin_ranks(self) -> list[Any]:
        """Place the learner's ranks; the references resolve when DeepSpeed is up on all of them."""
        learner = self.config.learner
        actor = ray.remote(LearnerRank)
        self.ranks = [
            actor.options(num_cpus=0, num_gpus=learner.gpus_per_rank).remote(rank, learner.ranks, self.config)
            for rank in range(learner.ranks)
        ]
        host, port = ray.get(self.ranks[0].address.remote(), timeout=START_TIMEOUT_S)
        return [rank.setup.remote(host, port) for rank in self.ranks]

    def wait_ranks(self, started: Sequence[Any]) -> None:
        """Block until the learner holds its weights."""
        self.learner_info = ray.get(list(started), timeout=START_TIMEOUT_S)[0]
        self.manifest = SyncManifest(tensors=self.learner_info.tensors, bucket_bytes=self.config.sync.bucket_bytes)

    def open_sync(self) -> None:
        """Form the weight group: rank 0 sends, every engine has an offset of its own."""
        size = self.config.rollout.tensor_parallel_size
        world = 1 + size * len(self.workers)
        host, port = ray.get(self.ranks[0].address.remote())
        joined = [self.ranks[0].open_sync.remote(host, port, world)]
        for index, worker in enumerate(self.workers):
            joined.append(worker.join_sync.remote(host, port, 1 + index * size, world))
        ray.get(joined, timeout=self.config.sync.timeout_s + SYNC_GRACE_S)

    def close_workers(self) -> None:
        """Stop the engines and give their devices back."""
        self._stop(self.workers, "close")
        self.workers = []

    def close(self) -> None:
        """Stop everything, politely first; never raises."""
        self.close_workers()
        self._stop(self.ranks, "close")
        self.ranks = []
        if self.teacher is not None:
            self._stop([self.teacher], "stop")
            self.teacher = None

    @staticmethod
    def _stop(actors: Sequence[Any], method: str) -> None:
        asked = []
        for actor in actors:
            try:
                asked.append(getattr(actor, method).remote())
            except ray.exceptions.RayError as error:
                log.debug("actor is gone already: %s", error)
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=STOP_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)

    # --- calls of the loop ------------------------------------------------------------------------------------------

    def rollout(self, index: int, prompt: Prompt, sample_id: str, step: int, sampling: Sampling) -> tuple[Any, Any]:
        """Start one answer on a worker: (reference to its summary, reference to the scored trajectory)."""
        worker = self.workers[index % len(self.workers)]
        summary, scored = worker.rollout_scored.options(num_returns=2).remote(prompt, sample_id, step, sampling)
        return summary, scored

    def accumulate(self, group: Sequence[Sequence[Any]]) -> list[Any]:
        """Give every rank its micro-batch of `group` (references to scored trajectories; empty ones take part)."""
        return [rank.accumulate.remote(*refs) for rank, refs in zip(self.ranks, group, strict=True)]

    def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        """Optimiser step of all ranks, divided by the step's global counts."""
        return list(ray.get([rank.finish_step.remote(tokens, sequences) for rank in self.ranks]))

    def publish(self, version: int) -> Any:
        """Send the learner's weights to every engine as `version`; returns rank 0's report."""
        sent = [rank.publish.remote() for rank in self.ranks]
        received = [worker.receive_weights.remote(self.manifest, version) for worker in self.workers]
        return ray.get([*sent, *received])[0]  # every collective in it has its own time limit

    def probe(self, sequences: Sequence[TokenSequence]) -> tuple[list[Arrays], Arrays]:
        """log-probs of the probe's response tokens: (every engine's, the learner's), computed side by side."""
        fixed = list(sequences)
        engines = [worker.probe.remote(fixed) for worker in self.workers]
        ranks = [rank.logprobs.remote(fixed) for rank in self.ranks]
        return list(ray.get(engines)), list(ray.get(ranks)[0])

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Answers to token prompts, dealt out to the workers, in the order of the prompts."""
        count = len(self.workers)
        shares = [
            worker.generate.remote([list(prompt) for prompt in prompts[i::count]], sampling)
            for i, worker in enumerate(self.workers)
        ]
        answers: list[Answer | None] = [None] * len(prompts)
        for i, share in enumerate(ray.get(shares)):
            answers[i::count] = share
        return [answer for answer in answers if answer is not None]

    def save(self, folder: str) -> None:
        """Export the learner's weights as a Hugging Face folder."""
        ray.get([rank.save.remote(folder) for rank in self.ranks])

    def save_state(self, folder: str) -> None:
        """Write the learner's resumable state; every rank its part."""
        ray.get([rank.save_state.remote(folder) for rank in self.ranks])

    def load_state(self, folder: str) -> None:
        """Continue from `save_state`: weights, optimiser, counters."""
        ray.get([rank.load_state.remote(folder) for rank in self.ranks])

    def teacher_fingerprints(self) -> dict[str, str]:
        """Name of each connected teacher -> fingerprint of its model."""
        return {} if self.teacher_info is None else {"default": self.teacher_info.model_fingerprint}


async def _info(url: str, config: Config, key: str | None, ca_file: str | None) -> TeacherInfo:
    client = TeacherClient(url, config.run.name, config.teacher.request_timeout_s, key, ca_file=ca_file)
    try:
        return await client.info()
    finally:
        await client.close()


__all__ = ["AccumulateReport", "Services"]
