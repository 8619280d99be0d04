"""Answers on their way: rollout → (a pass of the learner) → score, each by itself, until the loop takes it.

::

    fill ──► rollout ──────────────► score ──► finished ──► step() gives it to the loop
              (a worker)   │           ▲
                           └► a rank ──┘   rollout.topk_from: learner, teacher.kind: base (which needs no other score)

Where the teacher's answers are trained on (``rollout.source: teacher``), a stored one takes the place of the rollout.
What may be issued, what is too old and what a step may take is `StalenessTracker`'s decision; this file does it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.model import Config
from common.protocol.schema import Sample
from common.telemetry.trace import TraceSpan
from learner.cluster.services import EpisodeSummary, Prepared, Services
from learner.data.samples import SampleSource
from learner.data.teacher_answers import Offline, Replayed
from learner.loop.learner_scoring import LearnerPasses
from learner.loop.staleness import StalenessTracker, Verdict


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """An answer that went all the way: `item` is the reference to what the learner trains on. `error` says why there
    is no score; `spans` are where its time went.
    """

    sample: Sample
    summary: Any
    item: Any
    error: str | None
    spans: tuple[TraceSpan, ...]
    topk_agreement: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt + response; of an episode the sum over its sequences, so that a micro-batch holds no more tokens than
        it would of answers (the rank cuts an episode that is longer than one).
        """
        return int(self.summary.prompt_tokens + self.summary.response_tokens)

    @property
    def episode(self) -> EpisodeSummary | None:
        """What was played, where the sample is a game."""
        found: EpisodeSummary | None = self.summary.episode
        return found

    @property
    def sequences(self) -> int:
        """How many the learner is given."""
        return 1 if self.episode is None else self.episode.sequences


class RolloutPipeline:
    """The samples of a run on their way, as far ahead of training as `rollout.max_staleness` allows.

    Used on one event loop. A resumed run begins at `next_number`, the numbers in `again` before it. With `offline` the
    answers are the stored ones.
    """

    def __init__(
        self,
        config: Config,
        services: Services,
        source: SampleSource,
        version: int,
        next_number: int,
        again: Sequence[int],
        offline: Offline | None = None,
    ) -> None:
        self._config = config
        self._services = services
        self._source = source
        self._offline = offline
        per_step = source.per_step
        self.tracker = StalenessTracker(
            max_staleness=config.rollout.max_staleness,
            samples_per_step=per_step,
            oversample=round(config.rollout.oversample_fraction * per_step),
            version=version,
            steps=config.learner.steps,
        )
        self._next = next_number
        self._again = list(again)
        self._tasks: dict[str, asyncio.Task[ScoredRollout]] = {}
        self._in_flight: dict[str, Sample] = {}
        self._finished: asyncio.Queue[asyncio.Task[ScoredRollout]] = asyncio.Queue()
        self._ready: dict[str, ScoredRollout] = {}
        self._evicted: dict[str, Sample] = {}
        self._lengths: dict[str, int] = {}
        self._unpassed: set[str] = set()
        self._passes = LearnerPasses(config, services)

    # --- for the loop -----------------------------------------------------------------------------------------------

    async def step(self, failed: Callable[[ScoredRollout], None]) -> AsyncIterator[ScoredRollout]:
        """The answers to train on in this step, as they come; `failed` hears of those that cannot be scored."""
        self._fill()
        while self.tracker.room():
            for sample_id in self.tracker.take():
                yield self._ready.pop(sample_id)
            if not self.tracker.room():
                break
            finished = await self._finished.get()
            self._tasks.pop(finished.get_name(), None)
            if not finished.cancelled():  # a straggler that was cut off
                self._settle(finished.result(), failed)
                self._fill()
        self._discard_excess()

    def advance(self) -> None:
        """The next version is in the learner and in every engine: what is too old now is to be answered again.

        Nothing is issued before the next `step`: an evaluation or a checkpoint may come first, and answers made beside
        it would belong to no step's time.
        """
        for sample_id in self.tracker.advance():
            self._evicted[sample_id] = self._ready.pop(sample_id).sample

    def position(self) -> dict[str, Any]:
        """Where a resumed run begins: the next new number, and what is under way."""
        samples = [*self._in_flight.values(), *self._evicted.values(), *(a.sample for a in self._ready.values())]
        under_way = {sample.sample_id: sample.number for sample in samples}
        return {
            "next": self._next,
            "again": [*(under_way[sample_id] for sample_id in self.tracker.outstanding()), *self._again],
        }

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- issuing ----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Issue all that may be, the longest first: a step ends with its last answer."""
        samples = [self._draw() for _ in range(self.tracker.may_issue())]
        longest = self._config.rollout.max_tokens
        for sample in sorted(samples, key=lambda one: -self._lengths.get(one.prompt.row_id, longest)):
            self._in_flight[sample.sample_id] = sample
            task = asyncio.get_running_loop().create_task(self._answer(sample), name=sample.sample_id)
            task.add_done_callback(self._finished.put_nowait)
            self._tasks[sample.sample_id] = task

    def _draw(self) -> Sample:
        if self._evicted:
            sample_id = self.tracker.evicted()[0]
            self.tracker.reissue(sample_id)
            return self._evicted.pop(sample_id)
        if self._again:
            number = self._again.pop(0)
        else:
            number, self._next = self._next, self._next + 1
        sample = self._source[number]
        self.tracker.issue(sample.sample_id)
        return sample

    def _settle(self, answered: ScoredRollout, failed: Callable[[ScoredRollout], None]) -> None:
        sample, summary = answered.sample, answered.summary
        if self._in_flight.pop(sample.sample_id, None) is None:
            return  # discarded while its answer lay in the queue
        self._lengths[sample.prompt.row_id] = summary.response_tokens
        if answered.error is not None:
            self.tracker.fail(sample.sample_id)
            failed(answered)
        elif self.tracker.finish(sample.sample_id, summary.versions, summary.response_tokens) is Verdict.READY:
            self._ready[sample.sample_id] = answered
        else:
            self._evicted[sample.sample_id] = sample

    def _discard_excess(self) -> None:
        """Over-issued samples that the step did not wait for."""
        for sample_id in self.tracker.stragglers():
            self.tracker.discard(sample_id)
            self._ready.pop(sample_id, None)
            self._in_flight.pop(sample_id, None)
            task = self._tasks.pop(sample_id, None)
            if task is not None:
                task.cancel()

    # --- one answer -------------------------------------------------------------------------------------------------

    async def _answer(self, sample: Sample) -> ScoredRollout:
        issued, config = time.time(), self._config
        by_engine = config.rollout.topk_from == "engine" and config.teacher.kind != "base"
        if by_engine and self._offline is None:
            summary, item = await self._services.rollout_scored(sample)
            return _answered(sample, issued, summary, summary.score, item)
        if by_engine:
            summary, item = await self._rollout(sample)
            score, item = await self._services.score(sample, item)
            return _answered(sample, issued, summary, score, item)
        self._unpassed.add(sample.sample_id)
        try:
            summary, item = await self._rollout(sample)
            passed = self._passes.add(summary.prompt_tokens + summary.response_tokens, item)
        finally:
            self._unpassed.discard(sample.sample_id)
            self._flush_passes()
        group, place = await passed
        prepared = (await asyncio.shield(group))[place]
        if config.teacher.kind == "base":
            return _answered(sample, issued, summary, None, prepared.item, prepared)
        score, item = await self._services.score(sample, prepared.item)
        return _answered(sample, issued, summary, score, item, prepared)

    def _flush_passes(self) -> None:
        """A group that is not full does not wait where nobody else comes to fill it, or where the step has all other
        answers that it takes: those that would come run ahead.
        """
        rolled_out = len(self._in_flight) - len(self._unpassed) + len(self._ready)
        if not self._unpassed or rolled_out - len(self._passes) < self.tracker.room() <= rolled_out:
            self._passes.flush()

    async def _rollout(self, sample: Sample) -> tuple[Any, Any]:
        """(summary, answer or a reference to it), unscored."""
        if self._offline is None:
            return await self._services.rollout(sample)
        trajectory = self._offline.trajectory(sample, self.tracker.version)
        return Replayed.of(trajectory), trajectory


def _answered(
    sample: Sample, issued: float, summary: Any, score: Any, item: Any, prepared: Prepared | None = None
) -> ScoredRollout:
    args = {"sample": sample.sample_id}
    spans = []
    if not isinstance(summary, Replayed):
        # The sizes are for `opcd simulate`.
        sizes = {"prompt_tokens": summary.prompt_tokens, "response_tokens": summary.response_tokens}
        spans += [
            TraceSpan("queue", "controller", issued, summary.started, args),
            TraceSpan("rollout", f"worker {summary.worker}", summary.started, summary.ended, {**args, **sizes}),
        ]
    if prepared is not None:
        spans.append(prepared.span)
    if score is not None:
        spans.append(TraceSpan("score", "teacher", score.started, score.ended, args))
    agreement = None if prepared is None else prepared.agreement
    return ScoredRollout(sample, summary, item, score and score.error, tuple(spans), agreement)
