"""Stand-ins for the services that the loop drives, and a small configuration."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from common.config.loader import validate
from common.config.model import Config
from common.protocol.schema import Prompt, Sample, as_ids
from common.telemetry.trace import TraceSpan
from learner.cluster.services import Prepared, Services
from learner.loop.parity import ParityReport
from learner.loop.training_loop import TrainingLoop
from learner.loop.weight_publisher import WeightPublisher
from learner.trainer.reports import AccumulateReport, StepReport

ROWS = [Prompt(f"row{i}", as_ids([1, 2]), as_ids([1, 2]), None) for i in range(10)]


def config_of(**rollout: Any) -> Config:
    settings = {
        "run": {"name": "r"},
        "student": {"model": "m"},
        "context": {"text": "c"},
        "data": {"train": "t"},
        "rollout": {"batch_size": 4, "max_tokens": 8, **rollout},
        "loss": {"top_k": 4},
    }
    return validate(Config, settings)


@dataclass
class StubServices:
    """Answers samples at once, except `slow` ones, which wait for `release`; keeps the requests."""

    version: int = 0
    packed: bool = False
    slow: set[str] = field(default_factory=set)
    unscored: set[str] = field(default_factory=set)
    contexts: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """Sample -> id of the context made for its answer, and the error of making it."""
    asked: list[str] = field(default_factory=list)
    groups: list[list[list[Any]]] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def _summary(self, sample: Sample, version: int) -> Any:
        return SimpleNamespace(
            worker=0,
            prompt_tokens=2,
            response_tokens=3,
            student_tokens=3,
            finish_reason="stop",
            versions=((0, version),),
            started=0.0,
            ended=1.0,
            answer=sample.number,
            score=None,
            episode=None,
            context=self.context_of(sample),
        )

    def context_of(self, sample: Sample) -> Any:
        if sample.sample_id not in self.contexts:
            return None
        context_id, error = self.contexts[sample.sample_id]
        return SimpleNamespace(started=1.0, ended=1.5, context_id=context_id, error=error)

    async def rollout(self, sample: Sample, output: str) -> tuple[Any, Any]:
        self.asked.append(sample.sample_id)
        version = self.version
        await asyncio.sleep(0)
        if sample.sample_id in self.slow:
            await self.release.wait()
        summary = self._summary(sample, version)
        item: Any = sample.sample_id
        if summary.context is not None and summary.context.context_id is None:
            return summary, None
        if output == "scored":
            summary.score, item = await self.score(sample, item)
        return summary, item

    async def score(self, sample: Sample, item: Any) -> tuple[Any, Any]:
        error = "no" if sample.sample_id in self.unscored else None
        return SimpleNamespace(started=1.0, ended=2.0, error=error), item

    async def prepare(self, group: list[list[Any]]) -> list[Prepared]:
        self.groups.append(group)
        span = TraceSpan("topk", "rank 0", 1.0, 1.5)
        return [Prepared(f"picked {item}", 0.5, span) for share in group for item in share]


class OrderedServices(StubServices):
    """Keeps the order of the loop's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.pool = SimpleNamespace(
            watch=self._idle, only_replacements=self._idle, restarts=0, reissued=0, members=[1], ready=[]
        )
        self.teachers = SimpleNamespace(watch=self._idle)

    async def _idle(self) -> None:
        await asyncio.Event().wait()

    def leave_draining_nodes(self) -> None:
        pass

    async def rollout(self, sample: Sample, output: str) -> tuple[Any, Any]:
        self.order.append("rollout")
        return await super().rollout(sample, output)

    def accumulate(self, group: Any) -> list[Any]:
        self.order.append("accumulate")
        report = AccumulateReport(sum(map(len, group)), 0, 0.0, 0.0)
        done: Future[AccumulateReport] = Future()
        done.set_result(report)
        return [SimpleNamespace(future=lambda: done)]

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        self.order.append("step")
        return [StepReport(1, True, 0, {"kl/lower_bound": 1.0})]


class StubPublisher:
    """Publishes nothing; notes in `order` when it was asked."""

    def __init__(self, order: list[str] | None = None) -> None:
        self.order = [] if order is None else order
        self.expert_mismatch: dict[str, float] = {}

    async def publish(self, version: int, *, again: bool = False) -> ParityReport:
        self.order.append("publish")
        return ParityReport(0.0, 0.0, 0.0, 0.0, 0.0)

    def take_spans(self) -> list[TraceSpan]:
        return []


def loop_over(services: StubServices, config: Config | None = None, **parts: Any) -> TrainingLoop:
    """A training loop over stubs."""
    publisher = cast(WeightPublisher, StubPublisher(getattr(services, "order", None)))
    parts = {"status": lambda _: None, "prompts": ROWS, **parts}
    return TrainingLoop(config or config_of(), cast(Services, services), publisher, **parts)
