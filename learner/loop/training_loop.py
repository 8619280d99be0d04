"""The training loop: rollout → score → accumulate → optimiser step → publish.

::

    SampleSource ─► [in flight] ─► [finished] ─► [ready] ─► [micro-batcher] ─► ranks ─► optimiser ─► publish ─► parity
      sample n       one task a     asyncio       waits for   waits for a       gradient   step        version    check
                     sample         queue         its step    full group        sums       (barrier)   n + 1      (gate)
                     │   ▲                        │
                     │   └──── issued again ◄─────┴─ too old: evicted
                     └─ worker pool: vLLM rollout, then the teacher's scores, in one actor call

    coroutine                 consumes        produces              waits for                    unblocks
    TrainingLoop.steps        step numbers    StepOutcome           step                         checkpoints in run.py
    TrainingLoop.step         gradient sums   weights, version n+1  _train, optimiser, sync      the next step's samples
    TrainingLoop._train       ready rollouts  gradient sums         RolloutPipeline.step         the optimiser
    RolloutPipeline.step      finished tasks  ready rollouts        the queue of finished tasks  the micro-batcher
    RolloutPipeline._roll_out one sample      one ScoredRollout     a free worker, the teacher   RolloutPipeline.step

Within a step all stages overlap: a rollout is scored as soon as it ends, and trained as soon as a micro-batch is full.
The optimiser step is the only barrier. This process holds ids and object references, never tensors.

`learner.loop.staleness` decides which samples may be issued and which are too old; `learner.loop.micro_batcher` forms
micro-batches. Only with ``rollout.topk_from: learner`` or ``teacher.kind: base`` rollouts also pass
`learner.loop.learner_scoring`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from common.async_utils import all_of, despite_cancel, run_in_background
from common.config.model import Config
from common.protocol.schema import Prompt, Sample
from common.telemetry.trace import TraceSpan
from learner.cluster.services import Services
from learner.data.context_sampling import ContextSampler
from learner.data.samples import SampleSource
from learner.data.teacher_answers import Replayed, TeacherAnswers
from learner.errors import RunError
from learner.loop.learner_scoring import LearnerScoring
from learner.loop.micro_batcher import MicroBatcher
from learner.loop.rewards import reward_groups, rewarded
from learner.loop.staleness import StalenessTracker, Verdict
from learner.loop.step_stats import RecordSkipped, ScoredRollout, StepOutcome, StepStats, check_step, scored_rollout
from learner.loop.weight_publisher import WeightPublisher


class TrainingLoop:
    """Runs the steps of one run over started services, on one event loop: `begin`, `steps`, `close`."""

    def __init__(
        self,
        config: Config,
        services: Services,
        publisher: WeightPublisher,
        prompts: Sequence[Prompt],
        status: Callable[[str], None],
        record_skipped: RecordSkipped = lambda step, records: None,
        context_sampler: ContextSampler | None = None,
        teacher_answers: TeacherAnswers | None = None,
        set_sizes: Sequence[int] = (),
    ) -> None:
        """`status` shows progress; `record_skipped` gets the records of each step that a NaN cost. With
        `context_sampler` every sample has its own context; `teacher_answers` holds those of samples from the teacher;
        `set_sizes` are those of `SampleSource`.
        """
        self._config = config
        self._services = services
        self._publisher = publisher
        self._status = status
        self._record_skipped = record_skipped
        self._source = SampleSource(config, prompts, context_sampler, set_sizes)
        self._teacher_answers = teacher_answers
        self._reward_groups = reward_groups(config)
        self._pipeline: RolloutPipeline | None = None

    async def begin(self, version: int, position: Mapping[str, Any] | None = None) -> None:
        """Start at `version`: 0, or the one that the learner has loaded, at the `position` saved with it."""
        if version:
            await self._publisher.publish(version, again=True)
        first = position or {"next": version * self._source.per_step, "again": []}
        self._pipeline = RolloutPipeline(
            self._config, self._services, self._source, version, first["next"], first["again"], self._teacher_answers
        )

    def position(self) -> dict[str, Any]:
        """The point at which a resumed run goes on, as JSON values; call it between steps."""
        return self._running.position()

    async def close(self) -> None:
        """Cancel the rollouts in flight."""
        if self._pipeline is not None:
            await self._pipeline.close()

    @property
    def _running(self) -> RolloutPipeline:
        if self._pipeline is None:
            raise RuntimeError("the training loop was used before begin")
        return self._pipeline

    async def steps(self, first: int) -> AsyncIterator[StepOutcome]:
        """All steps from `first` on. The caller's work between two steps (validation, checkpoint) pauses rollouts."""
        for step in range(first, self._config.learner.steps):
            yield await self.step(step)

    async def step(self, step: int) -> StepOutcome:
        """Make the weights of version `step` + 1. Raises RunError if the run cannot go on, and what services raise."""
        services, started = self._services, time.time()
        workers = len(services.pool.members)
        async with run_in_background(services.pool.watch(), services.teachers.watch(), self.keep_workers(step)):
            stats = await self._train(step)
        # Half a step is of no use to a checkpoint: an interrupt waits for the optimiser and the sync.
        return await despite_cancel(self._update(step, stats, started, workers))

    async def _update(self, step: int, stats: StepStats, started: float, workers: int) -> StepOutcome:
        """Optimiser step and sync: everything after the gradients."""
        services, step_started = self._services, time.time()
        reports = await services.finish_step(stats.tokens, stats.sequences)
        stats.spans.append(TraceSpan("step", "rank 0", step_started, time.time(), {"version": step + 1}))
        check_step(step, reports, stats.sample_ids, self._config.learner.max_skipped_steps, self._record_skipped)
        services.leave_draining_nodes()
        parity = await self._publisher.publish(step + 1)
        staleness = self._running.tracker.metrics()
        self._running.advance()
        stats.spans += self._publisher.take_spans()
        pool: dict[str, float] = {
            "rollout/workers": workers,
            "rollout/restarts": services.pool.restarts,
            "rollout/reissued": services.pool.reissued,
        }
        if self._config.rollout.teacher_answers:
            pool["rollout/teacher_share"] = stats.from_teacher / max(stats.answers, 1)
        if self._config.context.from_rollout is not None:
            pool["context/dropped"] = len(stats.dropped)
        if self._config.data.mix:
            pool |= {f"mix/{name}": n / max(stats.answers, 1) for name, n in stats.by_set.items()}
        return stats.outcome(
            version=step + 1,
            during=(started, time.time()),
            reports=reports,
            parity=parity,
            metrics={**staleness, **pool, **self._publisher.expert_mismatch},
            max_token_samples=self._config.run.token_samples,
        )

    async def _train(self, step: int) -> StepStats:
        """Rollouts, scores and gradients of one step: everything before the optimiser."""
        learner, stats = self._config.learner, StepStats()
        batcher: MicroBatcher[Any] = MicroBatcher(
            learner.ranks, learner.micro_batch_tokens, packed=self._services.packed
        )
        accumulating: list[Any] = []
        async for rollout in rewarded(self._reward_groups, self._rollouts(stats)):
            stats.add(rollout)
            for group in batcher.add(rollout.tokens, (rollout.item, rollout.advantage, rollout.sample.data_set)):
                accumulating += self._services.accumulate(group)
            progress = f"{stats.answers}/{self._source.per_step} answers, {stats.student_tokens} tokens"
            self._status(f"step {step + 1}: {progress}")
        for group in batcher.flush():
            accumulating += self._services.accumulate(group)
        self._status(f"step {step + 1}: {stats.student_tokens} tokens, learning")
        stats.add_passes(step, learner.ranks, await all_of(accumulating))
        return stats

    async def _rollouts(self, stats: StepStats) -> AsyncIterator[ScoredRollout]:
        """The step's rollouts as they arrive; with ``learner.deterministic``, for which the arrival order must not
        matter, in the order of their numbers.
        """

        def failed(rollout: ScoredRollout) -> None:
            if rollout.dropped:
                stats.dropped.append(rollout.sample.sample_id)
                return
            stats.failures[rollout.sample.sample_id] = str(rollout.error)
            self._check_failures(stats.failures)

        rollouts = self._running.step(failed)
        if not self._config.learner.deterministic:
            async for rollout in rollouts:
                yield rollout
            return
        for rollout in sorted([rollout async for rollout in rollouts], key=lambda one: one.sample.number):
            yield rollout

    async def keep_workers(self, version: int) -> None:
        """If every worker has died, publish `version` to the first replacement at once, not at the next step.

        Runs until cancelled; use it with `run_in_background` around any wait for rollouts.
        """
        while True:
            await self._services.pool.only_replacements()
            await self._publisher.publish(version, again=True)

    def _check_failures(self, failures: Mapping[str, str]) -> None:
        issued, share = self._source.per_step, self._config.teacher.max_failed_fraction
        if len(failures) > share * issued:
            raise RunError(
                f"{len(failures)} of {issued} answers could not be scored, more than teacher.max_failed_fraction "
                f"allows ({share}); the last one: {': '.join(list(failures.items())[-1])}"
            )


class RolloutPipeline:
    """Samples on their way to the learner, as far ahead of training as `rollout.max_staleness` allows.

    Used on one event loop. A resumed run passes the numbers `again` before it goes on at `next_number`. A
    sample from the teacher has its stored answer in `teacher_answers`.
    """

    def __init__(
        self,
        config: Config,
        services: Services,
        source: SampleSource,
        version: int,
        next_number: int,
        again: Sequence[int],
        teacher_answers: TeacherAnswers | None = None,
    ) -> None:
        self._config = config
        self._services = services
        self._source = source
        self._teacher_answers = teacher_answers
        self.tracker = StalenessTracker(
            max_staleness=config.rollout.max_staleness,
            samples_per_step=source.per_step,
            oversample=round(config.rollout.oversample_fraction * source.per_step),
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
        """Row -> tokens of its newest answer."""
        self._unprepared: set[str] = set()
        """Samples that have yet to reach `learner_scoring`."""
        self._learner_scoring = LearnerScoring(config.learner, services)

    async def step(self, failed: Callable[[ScoredRollout], None]) -> AsyncIterator[ScoredRollout]:
        """The rollouts to train in this step, as they arrive; `failed` gets those without a score."""
        self._issue()
        while self.tracker.room():
            for sample_id in self.tracker.take():
                yield self._ready.pop(sample_id)
            if not self.tracker.room():
                break
            task = await self._finished.get()
            self._tasks.pop(task.get_name(), None)
            if not task.cancelled():  # a cancelled one was a straggler
                self._collect(task.result(), failed)
                self._issue()
        self._cancel_excess()

    def advance(self) -> None:
        """Count one more version as published, and evict ready rollouts that it makes too old.

        Nothing is issued before the next `step`: an evaluation or a checkpoint may come first, and rollouts made
        during it would belong to no step's time.
        """
        for sample_id in self.tracker.advance():
            self._evicted[sample_id] = self._ready.pop(sample_id).sample

    def position(self) -> dict[str, Any]:
        """The point at which a resumed run goes on: the next new number, and the numbers under way."""
        samples = [*self._in_flight.values(), *self._evicted.values(), *(one.sample for one in self._ready.values())]
        under_way = {sample.sample_id: sample.number for sample in samples}
        return {
            "next": self._next,
            "again": [*(under_way[sample_id] for sample_id in self.tracker.outstanding()), *self._again],
        }

    async def close(self) -> None:
        """Cancel everything in flight."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _issue(self) -> None:
        """Start all samples that the staleness bound allows, the longest first: a step ends with its last answer."""
        samples = [self._next_sample() for _ in range(self.tracker.may_issue())]
        longest = self._config.rollout.max_tokens
        for sample in sorted(samples, key=lambda one: -self._lengths.get(one.prompt.row_id, longest)):
            self._in_flight[sample.sample_id] = sample
            task = asyncio.get_running_loop().create_task(self._roll_out(sample), name=sample.sample_id)
            task.add_done_callback(self._finished.put_nowait)
            self._tasks[sample.sample_id] = task

    def _next_sample(self) -> Sample:
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

    async def _roll_out(self, sample: Sample) -> ScoredRollout:
        """One sample from the pool to its score: one actor call, unless the learner or a stored answer takes part."""
        issued, services = time.time(), self._services
        by_learner = self._config.rollout.topk_from == "learner" or self._config.teacher.kind == "base"
        if not sample.from_teacher and not by_learner:
            summary, item = await services.rollout(sample, "scored")
            return scored_rollout(sample, issued, summary, summary.score, item)
        prepared = None
        if not by_learner:
            summary, item = await self._unscored(sample)
        else:
            self._unprepared.add(sample.sample_id)
            try:
                summary, item = await self._unscored(sample)
                if summary.context is not None and summary.context.context_id is None:
                    return scored_rollout(sample, issued, summary, None, None)
                waiting = self._learner_scoring.add(summary.prompt_tokens + summary.response_tokens, item)
            finally:
                self._unprepared.discard(sample.sample_id)
                self._flush_learner_scoring()
            prepared = await self._learner_scoring.result(waiting)
            item = prepared.item
        if self._config.teacher.kind == "base":
            return scored_rollout(sample, issued, summary, None, item, prepared)
        score, item = await services.score(sample, item)
        return scored_rollout(sample, issued, summary, score, item, prepared)

    async def _unscored(self, sample: Sample) -> tuple[Any, Any]:
        """(summary, trajectory or a reference to it)."""
        if not sample.from_teacher:
            return await self._services.rollout(sample, "trajectory")
        assert self._teacher_answers is not None
        trajectory = self._teacher_answers.trajectory(sample, self.tracker.version)
        return Replayed.of(trajectory), trajectory

    def _flush_learner_scoring(self) -> None:
        """Start a group that is not full if no other sample can fill it, or if the step already has all other rollouts
        that it takes: those still to come run ahead.
        """
        rolled_out = len(self._in_flight) - len(self._unprepared) + len(self._ready)
        if not self._unprepared or rolled_out - len(self._learner_scoring) < self.tracker.room() <= rolled_out:
            self._learner_scoring.flush()

    def _collect(self, rollout: ScoredRollout, failed: Callable[[ScoredRollout], None]) -> None:
        sample, summary = rollout.sample, rollout.summary
        if self._in_flight.pop(sample.sample_id, None) is None:
            return  # discarded while it lay in the queue
        self._lengths[sample.prompt.row_id] = summary.response_tokens
        if rollout.error is not None or rollout.dropped:
            self.tracker.fail(sample.sample_id)
            failed(rollout)
        elif self.tracker.finish(sample.sample_id, summary.versions, summary.response_tokens) is Verdict.READY:
            self._ready[sample.sample_id] = rollout
        else:
            self._evicted[sample.sample_id] = sample

    def _cancel_excess(self) -> None:
        """Cancel oversampled rollouts that the step did not wait for."""
        for sample_id in self.tracker.stragglers():
            self.tracker.discard(sample_id)
            self._ready.pop(sample_id, None)
            self._in_flight.pop(sample_id, None)
            task = self._tasks.pop(sample_id, None)
            if task is not None:
                task.cancel()
