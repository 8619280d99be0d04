"""A run's services without a model: real actors, pool, queues, HTTP and controller; only forward passes are sleeps.

`Latencies` travels to the actors in an environment variable, since they are made by the code under test.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

import learner.cluster.services
import learner.cluster.teachers
from common.config.model import Config
from common.protocol.schema import (
    ForwardPathName,
    Ids,
    ItemScore,
    Prompt,
    Sampling,
    TokenSequence,
    Trajectory,
    as_ids,
)
from learner.cluster.rank import LearnerRank
from learner.trainer.reports import AccumulateReport, LearnerInfo, StepReport
from rollout_workers.actor import RolloutWorker
from teacher_server.actor import TeacherActor
from teacher_server.backends.base import Work

TOKENS, VOCABULARY = 8, 512
VARIABLE = "OPCD_BENCH_LATENCIES"


@dataclass(frozen=True)
class Latencies:
    """Seconds. Answers end evenly over `rollout`; `score` and `train` are the whole step's work of a server and of a
    rank; `step` is the optimiser's, `sync` one publication's. With `sigma`, an answer takes `rollout` times a lognormal
    factor of mean 1.
    """

    answers: int
    rollout: float = 0.0
    sigma: float = 0.0
    score: float = 0.0
    train: float = 0.0
    step: float = 0.0
    sync: float = 0.0

    @classmethod
    def here(cls) -> Latencies:
        """What `install` was given, in any process of the run."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def answer_s(self, seed: int | None) -> float:
        """Seconds of the answer with that seed, if `sigma` is set."""
        return self.rollout * float(np.random.default_rng(seed).lognormal(-(self.sigma**2) / 2, self.sigma))


def install(latencies: Latencies) -> None:
    """Have the run's services made of stubs from here on. Call it before ``ray.init``."""
    os.environ[VARIABLE] = json.dumps(asdict(latencies))
    learner.cluster.services.RolloutWorker = StubWorker
    learner.cluster.services.LearnerRank = StubRank
    learner.cluster.teachers.TeacherActor = StubTeacher


class StubEngine:
    """`rollout_workers.engine.engine.RolloutEngine` with sleeps."""

    max_sequence_tokens = 4096
    weight_version = 0

    def __init__(self) -> None:
        self._asked = 0

    async def generate(self, prompt_ids: Sequence[int] | Ids, sampling: Sampling, request_id: str) -> Any:
        from rollout_workers.engine.engine import Generation

        latencies = Latencies.here()
        place = self._asked % latencies.answers + 1
        self._asked += 1
        versions = ((0, self.weight_version),)
        evenly_s = latencies.rollout * place / latencies.answers
        await asyncio.sleep(latencies.answer_s(sampling.seed) if latencies.sigma else evenly_s)
        ids = as_ids(np.arange(sampling.max_tokens))
        topk = as_ids(np.tile(np.arange(max(sampling.top_logprobs, 1)), (len(ids), 1)))
        return Generation(ids, np.full(len(ids), -1.0, np.float32), topk, "length", versions)

    async def logprobs(self, sequences: Sequence[TokenSequence]) -> list[Any]:
        return [np.full(len(sequence.response_ids), -1.0, np.float32) for sequence in sequences]

    async def join_sync(self, *_: Any) -> None:
        return None

    async def receive(self, manifest: Any, version: int) -> None:
        await asyncio.sleep(Latencies.here().sync)
        self.weight_version = version

    async def check_health(self) -> None:
        return None

    def answer_text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        return ""

    def close(self) -> None:
        return None


class StubWorker(RolloutWorker):
    """The real actor around a stub engine."""

    async def _running(self) -> Any:
        if self._engine is None:
            self._engine = StubEngine()
        return self._engine


class StubRank(LearnerRank):
    """A learner that counts what it is given and sleeps."""

    def setup(self, host: str, port: int) -> LearnerInfo:
        self._version, self._seen = 0, 0
        return LearnerInfo(self._rank, self._world_size, "cpu", "float32", 0, 0, VOCABULARY, (), 0)

    def try_save(self, *_: Any) -> None:
        return None

    def accumulate(self, more: Sequence[tuple[float, str]], *scored: Any) -> AccumulateReport:
        started, latencies = time.time(), Latencies.here()
        time.sleep(latencies.train * len(scored) / latencies.answers)
        tokens = sum(len(item.trajectory.response_ids) for item in scored)
        return AccumulateReport(len(scored), tokens, started, time.time())

    def finish_step(self, tokens: int, sequences: int) -> StepReport:
        time.sleep(Latencies.here().step)
        self._version += 1
        return StepReport(self._version, True, 0, {"kl/lower_bound": 1.0, "grad_norm": 1.0})

    def logprobs(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[Any]:
        return [np.full(len(sequence.response_ids), -1.0, np.float32) for sequence in sequences]

    def open_sync(self, *_: Any) -> None:
        return None

    def publish(self) -> None:
        return None


class StubBackend:
    """A model that takes `Latencies.score` for a step's answers."""

    name, dtype, model_name = "stub", "float32", "stub"
    path: ForwardPathName = "full"
    path_cost = "sleeps"
    model_fingerprint = "0" * 64
    vocab_size, max_sequence_tokens, weight_version = VOCABULARY, 4096, 0
    modes: ClassVar[dict[str, Any]] = {"at_ids": None, "sampled": None}

    def prefix_bytes(self, tokens: int) -> int:
        return tokens

    def embeds(self, ids: Ids) -> bool:
        return True

    def prefill(self, ids: Ids, parent: Any) -> Any:
        return StubPrefix(int(ids.size) + (0 if parent is None else parent.total_tokens), int(ids.size))

    def score(self, batch: Sequence[Work]) -> list[ItemScore]:
        latencies = Latencies.here()
        time.sleep(latencies.score * len(batch) / latencies.answers)
        return [self._score(work) for work in batch]

    def _score(self, work: Work) -> ItemScore:
        assert work.item.topk_ids is not None
        values = np.full(work.item.topk_ids.shape, -6.0, np.float16)
        ones = np.full(len(values), -1.0, np.float32)
        return ItemScore(values, ones, ones)


@dataclass(frozen=True)
class StubPrefix:
    total_tokens: int
    nbytes: int


class StubTeacher(TeacherActor):
    """The real server over HTTP, with a stub backend behind it."""

    def start(self, on_cluster: bool = False) -> str:
        from teacher_server.http.auth import single_key
        from teacher_server.http.serve import start_in_thread
        from teacher_server.scoring.service import TeacherService, TokenizerIdentity

        assert self._api_key is not None
        service = TeacherService(StubBackend(), self._config, TokenizerIdentity("1" * 64, "2" * 64))
        self._server = start_in_thread(service, self._config, single_key(self._api_key))
        return self._server.url


def prompts(count: int) -> list[Prompt]:
    """Rows of four tokens, all under one context of four."""
    ids = as_ids(range(4))
    return [Prompt(f"row{i}", ids, ids, None) for i in range(count)]


def stub_config(**sections: dict[str, Any]) -> Config:
    """A run over stubs."""
    from common.config.loader import validate

    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "stub"},
        "student": {"model": "none"},
        "context": {"text": "c"},
        "data": {"train": "none"},
        "rollout": {"max_tokens": TOKENS},
        "loss": {"top_k": 256},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return validate(Config, settings)


__all__ = ["Latencies", "Trajectory", "install", "prompts", "stub_config"]
