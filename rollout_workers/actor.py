"""A rollout worker: a Ray actor that runs one student engine and has each answer scored as soon as it ends.

Ray runs every concurrency group of an async actor on a separate event loop, but a vLLM engine and an HTTP client belong
to the loop that made them. The worker therefore does all its work on one private loop; the actor's methods wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ray
import xxhash

from common.config.model import Config
from common.data.model_lookup import load_tokenizer
from common.data.rendering import Renderer
from common.devices import see_only
from common.network import use_interface_of
from common.protocol.schema import F32, FinishReason, Prompt, Sample, ScoredTrajectory, TokenSequence, Trajectory
from common.protocol.scoring import Scorer, ScorerFactory, ScoringError
from common.weight_sync.manifest import SyncManifest
from rollout_workers.answer_contexts import AnswerContextError, AnswerContexts
from rollout_workers.environments.playing import (
    EpisodeSummary,
    Played,
    play_sample,
    spans_of,
    student_tokens,
    trajectories_of,
)
from rollout_workers.pool.failures import EngineLost

if TYPE_CHECKING:
    from rollout_workers.engine.engine import Generation, RolloutEngine

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_RENDERERS = 32
"""Renderers a worker keeps, one per context of a pool; each holds the tokens of its context."""

CONTROL = "control"
"""Concurrency group of calls that must not wait behind answers in flight."""
GROUPS = {CONTROL: 8}

Output = Literal["trajectory", "scored", "text"]
"""Second value of `RolloutWorker.rollout`: the trajectory, the trajectory with the teacher's scores, or plain text."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Facts about a running engine."""

    max_sequence_tokens: int
    weight_version: int


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """Times of one scoring, in seconds since the epoch; `error` is the reason if there is no score."""

    started: float
    ended: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ContextSummary:
    """A call of ``context.from_rollout``: times in seconds since the epoch, and the id of the context that it made.

    Without an id the answer is left out: `error` is the reason if the call failed, else None.
    """

    started: float
    ended: float
    context_id: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Sizes and times of one rollout, for the driver; the tokens stay in the object store.

    Times are seconds since the epoch. `student_tokens` leaves out what an environment said inside the response. For a
    game, token counts are sums over its sequences. `score` is None for a rollout that was not scored, `context` if
    contexts do not depend on answers.
    """

    sample_id: str
    worker: int
    prompt_tokens: int
    response_tokens: int
    student_tokens: int
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    started: float
    ended: float
    answer: int
    """Digest of the response's tokens: equal answers have equal ones."""
    score: ScoreSummary | None = None
    episode: EpisodeSummary | None = None
    text: str | None = None
    """The answer, without what ended it; only for a run with ``loss.reward_weight``, which grades it."""
    context: ContextSummary | None = None


@dataclass(frozen=True, slots=True)
class TextAnswer:
    """A generated answer as text, without stop string and end token, and as tokens."""

    text: str
    ids: list[int]
    finish_reason: FinishReason


Unscored = Trajectory | list[Trajectory]
"""One answer, or the sequences of one episode."""
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
        self._answer_contexts: AnswerContexts | None = None
        self._tokenizer: Any = None
        self._renderers: OrderedDict[str | None, Renderer] = OrderedDict()
        self._starting = asyncio.Lock()
        self._closed = False
        if ray.is_initialized():
            see_only(ray.get_gpu_ids())
        use_interface_of(ray.util.get_node_ip_address())  # the engine's processes join the weight group
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="engine", daemon=True).start()

    # --- rollouts ---------------------------------------------------------------------------------------------------

    @ray.method(num_returns=2)
    async def rollout(self, sample: Sample, output: Output, in_context: bool = False) -> tuple[RolloutSummary, Any]:
        """Answer `sample`, or play its game; the two values become two object references.

        With `output` `scored` the second value is None if the teacher has no score (the summary holds the error), with
        any but `text` if the answer has no context (``context.from_rollout``). With
        `text` it is a `TextAnswer`, or a `Played` for a game. `in_context`: the player of a game sees the context.
        """
        return await self._on_loop(self._rollout(sample, output, in_context))

    async def _rollout(self, sample: Sample, output: Output, in_context: bool) -> tuple[RolloutSummary, Any]:
        engine, started = await self._running(), time.time()
        item: Unscored | None
        if sample.prompt.game is None:
            generation = await engine.generate(sample.prompt.student_ids, sample.sampling, sample.sample_id)
            item = _trajectory(sample, generation)
            summary = _summary(self._number, [item], started)
            if output == "text" or self._config.loss.reward_weight:
                ids = generation.response_ids.tolist()
                summary = replace(summary, text=engine.answer_text(ids, sample.sampling.stop))
                if output == "text":
                    return summary, TextAnswer(str(summary.text), ids, generation.finish_reason)
        else:
            renderer = self._renderer(sample.prompt)
            own = sample.prompt.game.context if self._config.context.from_rows else None
            episode = await play_sample(
                engine, renderer, self._config.environment, sample, in_context=in_context, own_context=own
            )
            item = trajectories_of(episode, sample)
            totals = EpisodeSummary(len(item), len(episode.exchanges), episode.reward, episode.success)
            summary = replace(_summary(self._number, item, started), sample_id=sample.sample_id, episode=totals)
            if output == "text":
                return summary, Played(episode.exchanges, episode.outcome, episode.reward, episode.success)
        if self._config.context.from_rollout is not None:
            assert not isinstance(item, list)
            text = engine.answer_text(item.response_ids.tolist(), sample.sampling.stop)
            context, item = await self._with_context(item, text)
            summary = replace(summary, context=context)
            if item is None:
                return summary, None
        if output == "trajectory":
            return summary, item
        score, scored = await self._score(item)
        return replace(summary, score=score), scored

    async def _with_context(self, item: Trajectory, text: str) -> tuple[ContextSummary, Trajectory | None]:
        """The trajectory with the context for its answer; None if there is none."""
        if self._answer_contexts is None:
            self._answer_contexts = AnswerContexts(self._config.context, self._renderer(item.prompt))
        started = time.time()
        try:
            found = await self._answer_contexts.apply(item, text)
        except AnswerContextError as failure:
            return ContextSummary(started, time.time(), error=str(failure)), None
        name = None if found is None else found.prompt.context_id
        return ContextSummary(started, time.time(), name), found

    @ray.method(num_returns=2)
    async def score(self, item: Unscored) -> tuple[ScoreSummary, Scored | None]:
        """Have an unscored rollout scored; the two values become two object references."""
        return await self._on_loop(self._score(item))

    async def _score(self, item: Unscored) -> tuple[ScoreSummary, Scored | None]:
        if self._scorer is None:
            if self._scorer_factory is None:
                raise RuntimeError("this worker was started without a scorer: it can only generate")
            self._scorer = self._scorer_factory()
        started = time.time()
        scored: Scored
        try:
            if isinstance(item, list):
                # An episode is trained whole or not at all: part of one would be another game.
                scored = list(await asyncio.gather(*map(self._scorer.score, item)))
            else:
                scored = await self._scorer.score(item)
        except ScoringError as failure:
            return ScoreSummary(started, time.time(), str(failure)), None
        return ScoreSummary(started, time.time()), scored

    def _renderer(self, prompt: Prompt) -> Renderer:
        """The renderer of a game's turns, under the game's context or else the run's."""
        own = self._config.context.by_row  # then the context belongs to the row, not to the renderer
        context = None if prompt.game is None or own else prompt.game.context
        if context not in self._renderers:
            self._renderers[context] = self._make_renderer(context)
            if len(self._renderers) > MAX_RENDERERS:
                self._renderers.popitem(last=False)
        return self._renderers[context]

    def _make_renderer(self, context: str | None) -> Renderer:
        config = self._config
        if context is None:
            context = "" if config.context.pool else config.context.read()  # with a pool, every game has a context
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(config.student.model)
        return Renderer(
            self._tokenizer,
            context,
            config.student,
            config.context.placement,
            teacher_template_kwargs=config.context.chat_template_kwargs,
            contexts_travel=config.context.by_row,
        )

    # --- control ----------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group=CONTROL)
    async def ready(self) -> WorkerInfo:
        """Start the engine, once."""
        engine = await self._on_loop(self._running())
        return WorkerInfo(engine.max_sequence_tokens, engine.weight_version)

    @ray.method(concurrency_group=CONTROL)
    async def node(self) -> str:
        """Ray's id of the node that runs this worker."""
        return str(ray.get_runtime_context().get_node_id())

    @ray.method(concurrency_group=CONTROL)
    async def probe(self, sequences: Sequence[TokenSequence]) -> list[F32]:
        """The engine's log-probs of fixed responses, ``[T]`` each."""
        return await self._on_loop(self._call(lambda engine: engine.logprobs(sequences)))

    @ray.method(concurrency_group=CONTROL)
    async def experts(self, sequences: Sequence[TokenSequence]) -> list[Any]:
        """The experts that predict the tokens of fixed responses, ``[T, layers, k]`` each."""
        return await self._on_loop(self._call(lambda engine: engine.experts(sequences)))

    @ray.method(concurrency_group=CONTROL)
    async def check_health(self) -> None:
        """Return if the engine lives; if it is dead, end this actor, so that the pool replaces both."""
        await self._on_loop(self._call(lambda engine: engine.check_health()))

    @ray.method(concurrency_group=CONTROL)
    async def join_sync(self, host: str, port: int, rank: int, world_size: int) -> None:
        """Join the weight group; `rank` is the first of this engine's ranks."""
        await self._on_loop(self._call(lambda engine: engine.join_sync(host, port, rank, world_size)))

    @ray.method(concurrency_group=CONTROL)
    async def receive_weights(self, manifest: SyncManifest, version: int) -> None:
        """Load the weights of `version`."""
        await self._on_loop(self._call(lambda engine: engine.receive(manifest, version)))

    @ray.method(concurrency_group=CONTROL)
    async def close(self) -> None:
        """Stop the engine and close the teacher's client."""
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
            os._exit(1)  # an actor without an engine is useless, and the pool watches for its death

    async def _call(self, call: Callable[[RolloutEngine], Coroutine[Any, Any, R]]) -> R:
        return await call(await self._running())

    async def _running(self) -> RolloutEngine:
        async with self._starting:
            if self._closed:
                raise RuntimeError("the rollout worker is closed")
            if self._engine is None:
                from rollout_workers.engine.engine import RolloutEngine

                self._engine = await RolloutEngine.start(self._model, self._config, max_logprobs=self._max_logprobs)
            return self._engine


def _trajectory(sample: Sample, generation: Generation) -> Trajectory:
    return Trajectory(
        sample_id=sample.sample_id,
        step=sample.step,
        prompt=sample.prompt,
        response_ids=generation.response_ids,
        sampled_logprobs=generation.sampled_logprobs,
        topk_ids=generation.topk_ids,
        finish_reason=generation.finish_reason,
        versions=generation.versions,
    )


def _summary(worker: int, trajectories: Sequence[Trajectory], started: float) -> RolloutSummary:
    return RolloutSummary(
        sample_id=trajectories[0].sample_id,
        worker=worker,
        prompt_tokens=sum(len(one.prompt.student_ids) for one in trajectories),
        response_tokens=sum(len(one.response_ids) for one in trajectories),
        student_tokens=student_tokens(trajectories),
        finish_reason=trajectories[-1].finish_reason,
        versions=spans_of(trajectories),
        started=started,
        ended=time.time(),
        answer=xxhash.xxh64_intdigest(b"".join(one.response_ids.tobytes() for one in trajectories)),
    )
