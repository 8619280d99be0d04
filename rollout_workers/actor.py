"""A rollout worker: one engine in one Ray actor, each answer scored beside it the moment it ends.

Ray gives every concurrency group of an async actor an event loop of its own, and an engine (like an HTTP client)
belongs to the loop it was made in. So all work happens on one loop of the worker's own, and the actor's methods wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from common.config.model import Config
from common.data.rendering import Renderer, load_tokenizer
from common.protocol.schema import (
    F32,
    FinishReason,
    Prompt,
    Sample,
    Sampling,
    ScoredTrajectory,
    TokenSequence,
    Trajectory,
)
from common.protocol.scoring import Scorer, ScorerFactory, ScoringError
from common.weight_sync.manifest import SyncManifest
from rollout_workers.engine.stops import cut_text
from rollout_workers.environments.playing import (
    EpisodeSummary,
    Played,
    play_sample,
    spans_of,
    student_tokens,
    trajectories_of,
)
from rollout_workers.pool.failures import EngineLost
from rollout_workers.pool.outbox import Order, Outbox

if TYPE_CHECKING:
    from rollout_workers.engine.engine import RolloutEngine

log = logging.getLogger(__name__)

R = TypeVar("R")

RENDERERS = 32
"""Of contexts of a pool, kept by a worker: each holds a context's tokens."""

CONTROL, EXCHANGE = "control", "exchange"
"""Concurrency groups: of calls that must not wait behind answers in flight, and of those that bring orders."""
GROUPS = {CONTROL: 8, EXCHANGE: 4}
"""Calls at a time. Of `EXCHANGE` one waits for answers, others leave at once."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """An engine that is up."""

    limit_tokens: int
    weight_version: int


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What the controller hears of one scoring. Times are seconds since the epoch; `error` says why there is no
    score.
    """

    started: float
    ended: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """What the controller hears of one answer; the answer itself stays in the object store. Times are seconds since
    the epoch; `score` is None where it was not scored yet.
    """

    sample_id: str
    worker: int
    prompt_tokens: int
    response_tokens: int
    student_tokens: int
    """Of the response: all but what an environment said in it."""
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    started: float
    ended: float
    score: ScoreSummary | None = None
    episode: EpisodeSummary | None = None
    """Of a game. Tokens are then sums over its sequences, and the item is the list of them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer as text (special tokens and the stop left out) and as tokens."""

    text: str
    ids: list[int]
    finish_reason: FinishReason


Made = Trajectory | list[Trajectory]
"""An answer, or the sequences of an episode."""
Scored = ScoredTrajectory | list[ScoredTrajectory]


class RolloutWorker:
    """Make it with ``ray.remote(RolloutWorker)``; `ready` returns when the engine is up."""

    def __init__(
        self, model: str, config: Config, scorer_factory: ScorerFactory | None, *, max_logprobs: int, number: int = 0
    ) -> None:
        self._number = number
        self._model = model
        self._config = config
        self._max_logprobs = max_logprobs
        self._scorer_factory = scorer_factory
        self._scorer: Scorer | None = None
        self._engine: RolloutEngine | None = None
        self._renderer: Renderer | None = None
        self._renderers: dict[str, Renderer] = {}
        self._starting = asyncio.Lock()
        self._closed = False
        self._outbox = Outbox(self._ordered)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

    @ray.method(concurrency_group=CONTROL)
    async def ready(self) -> WorkerInfo:
        """Start the engine, once."""
        engine = await self._on_loop(self._running())
        return WorkerInfo(engine.limit_tokens, engine.weight_version)

    @ray.method(concurrency_group=CONTROL)
    async def node(self) -> str:
        """Ray's name of the node that it was placed on."""
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group=EXCHANGE)
    async def exchange(self, orders: Sequence[Order], cancelled: Sequence[int], most: int) -> list[Any]:
        """Take orders for answers (or episodes) and give what ended, as `Outbox.exchange` says. Of an answer that is
        to be scored and cannot be, the item is None and the summary has the error; TeacherError is its outcome's.
        """
        return await self._on_loop(self._outbox.exchange(orders, cancelled, most))

    @ray.method(num_returns=2)
    async def score(self, trajectory: Made) -> tuple[ScoreSummary, Scored | None]:
        """Have an answer scored that was ordered unscored; the two values are two references."""
        return await self._on_loop(self._score(trajectory))

    async def _ordered(self, order: Order) -> tuple[RolloutSummary, Made | Scored | None]:
        summary, trajectory = await self._rollout(order.sample)
        if not order.scored:
            return summary, trajectory
        score, scored = await self._score(trajectory)
        return replace(summary, score=score), scored

    async def _rollout(self, sample: Sample) -> tuple[RolloutSummary, Made]:
        engine = await self._running()
        started = time.time()
        if sample.prompt.game is not None:
            return await self._rollout_episode(engine, sample, started)
        answer = await engine.generate(sample.prompt.student_ids, sample.sampling, sample.sample_id)
        trajectory = Trajectory(
            sample_id=sample.sample_id,
            step=sample.step,
            prompt=sample.prompt,
            response_ids=answer.response_ids,
            sampled_logprobs=answer.sampled_logprobs,
            topk_ids=answer.topk_ids,
            finish_reason=answer.finish_reason,
            versions=answer.versions,
        )
        summary = RolloutSummary(
            sample_id=sample.sample_id,
            worker=self._number,
            prompt_tokens=len(sample.prompt.student_ids),
            response_tokens=len(answer.response_ids),
            student_tokens=len(answer.response_ids),
            finish_reason=answer.finish_reason,
            versions=answer.versions,
            started=started,
            ended=time.time(),
        )
        return summary, trajectory

    async def _rollout_episode(
        self, engine: RolloutEngine, sample: Sample, started: float
    ) -> tuple[RolloutSummary, list[Trajectory]]:
        renderer = self._rendering(sample.prompt)
        episode = await play_sample(engine, renderer, self._config.environment, sample)
        made = trajectories_of(episode, sample)
        summary = RolloutSummary(
            sample_id=sample.sample_id,
            worker=self._number,
            prompt_tokens=sum(len(one.prompt.student_ids) for one in made),
            response_tokens=sum(len(one.response_ids) for one in made),
            student_tokens=student_tokens(made),
            finish_reason=made[-1].finish_reason,
            versions=spans_of(made),
            started=started,
            ended=time.time(),
            episode=EpisodeSummary(len(made), len(episode.exchanges), episode.reward, episode.success),
        )
        return summary, made

    def _rendering(self, prompt: Prompt) -> Renderer:
        """What the turns of a game are rendered by, under the context that goes with it."""
        if self._renderer is None:
            config = self._config
            # Of a pool no text is the run's: each game brings its own.
            text = "" if config.context.pool else config.context.read()
            self._renderer = Renderer(
                load_tokenizer(config.student.model), text, config.student, config.context.placement
            )
        own = None if prompt.game is None else prompt.game.context
        if own is None:
            return self._renderer
        if own not in self._renderers:
            if len(self._renderers) == RENDERERS:
                self._renderers.pop(next(iter(self._renderers)))
            self._renderers[own] = self._renderer.under(own)
        return self._renderers[own]

    async def _score(self, trajectory: Made) -> tuple[ScoreSummary, Scored | None]:
        if self._scorer is None:
            if self._scorer_factory is None:
                raise RuntimeError("this worker was started without a scorer: it can only generate")
            self._scorer = self._scorer_factory()
        started = time.time()
        scored: Scored
        try:
            if isinstance(trajectory, list):
                # Of an episode everything is trained, or nothing: the ones that are left would not be the same game.
                scored = list(await asyncio.gather(*map(self._scorer.score, trajectory)))
            else:
                scored = await self._scorer.score(trajectory)
        except ScoringError as failure:
            return ScoreSummary(started, time.time(), str(failure)), None
        return ScoreSummary(started, time.time()), scored

    async def generate(self, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[Answer]:
        """Answers to token prompts, each under its own sampling, in their order."""
        return await self._on_loop(self._generate(asked))

    async def _generate(self, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[Answer]:
        engine = await self._running()

        async def one(index: int, prompt: Sequence[int], sampling: Sampling) -> Answer:
            answer = await engine.generate(prompt, sampling, f"generate-{time.monotonic_ns()}-{index}")
            ids = answer.response_ids.tolist()
            return Answer(cut_text(engine.decode(ids), sampling.stop), ids, answer.finish_reason)

        return list(await asyncio.gather(*(one(i, *pair) for i, pair in enumerate(asked))))

    async def play(self, asked: Sequence[tuple[Prompt, Sampling]], in_context: bool) -> list[Played]:
        """Games of prompts, each under its own sampling, played to their end, in their order; `in_context`: by a
        student that sees the context.
        """
        return await self._on_loop(self._play(asked, in_context))

    async def _play(self, asked: Sequence[tuple[Prompt, Sampling]], in_context: bool) -> list[Played]:
        engine, name = await self._running(), f"play-{time.monotonic_ns()}"
        samples = [Sample(i, 0, f"{name}-{i}", *pair) for i, pair in enumerate(asked)]
        settings = self._config.environment
        episodes = await asyncio.gather(
            *(play_sample(engine, self._rendering(one.prompt), settings, one, in_context=in_context) for one in samples)
        )
        return [Played(one.exchanges, one.outcome, one.reward, one.success) for one in episodes]

    @ray.method(concurrency_group=CONTROL)
    async def probe(self, sequences: Sequence[TokenSequence]) -> list[F32]:
        """The engine's log-probs of fixed responses, ``[T]`` each."""
        return await self._on_loop(self._called(lambda engine: engine.logprobs(sequences)))

    @ray.method(concurrency_group=CONTROL)
    async def check_health(self) -> None:
        """Returns where the engine lives; where it does not, this actor ends too, so that the loop replaces both."""
        await self._on_loop(self._called(lambda engine: engine.check_health()))

    @ray.method(concurrency_group=CONTROL)
    async def sleep(self) -> None:
        """Give the engine's GPU memory back until `wake`."""
        await self._on_loop(self._called(lambda engine: engine.sleep()))

    @ray.method(concurrency_group=CONTROL)
    async def wake(self) -> None:
        """Take it again."""
        await self._on_loop(self._called(lambda engine: engine.wake()))

    @ray.method(concurrency_group=CONTROL)
    async def join_sync(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the weight group with `rank` as this engine's first."""
        await self._on_loop(self._called(lambda engine: engine.join_sync(host, port, rank, world_size)))

    @ray.method(concurrency_group=CONTROL)
    async def receive_weights(self, manifest: SyncManifest, version: int) -> None:
        """Take the weights of `version`."""
        await self._on_loop(self._called(lambda engine: engine.receive(manifest, version)))

    @ray.method(concurrency_group=CONTROL)
    async def close(self) -> None:
        """Stop the engine and let go of the teacher."""
        await self._on_loop(self._close())

    async def _close(self) -> None:
        if self._scorer is not None:
            await self._scorer.close()
            self._scorer = None
        async with self._starting:
            self._closed = True
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    async def _on_loop(self, work: Coroutine[Any, Any, R]) -> R:
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except EngineLost as error:
            log.critical("%s: this worker ends with it", error)
            os._exit(1)  # an actor without an engine is of no use, and its death is what the pool watches for

    async def _called(self, call: Callable[[RolloutEngine], Coroutine[Any, Any, R]]) -> R:
        return await call(await self._running())

    async def _running(self) -> RolloutEngine:
        async with self._starting:
            if self._closed:
                raise RuntimeError("the rollout worker is closed")
            if self._engine is None:
                from rollout_workers.engine.engine import RolloutEngine

                self._engine = await RolloutEngine.start(self._model, self._config, max_logprobs=self._max_logprobs)
            return self._engine
