"""Discrete-event simulation of a run: the loop's own rules over stages that take time and compute nothing.

::

    issue ─► queue ─► rollout ─► queue ─► score ─► micro-batch ─► accumulate ─► step ─► sync ─► parity
             (slots)             (replicas)        (fills up)     (ranks)

The classes of a real run decide which samples run ahead (`StalenessTracker`), which worker takes a sample (`Dispatch`)
and how micro-batches fill (`MicroBatcher`). Random values are drawn by sample number, so two configurations that
differ only in machines are compared on the same answers.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from common.telemetry.intervals import Interval
from common.telemetry.step_times import QUEUE, step_times
from common.telemetry.trace import TraceSpan
from deploy.simulator.clock import Schedule, WorkerClock
from deploy.simulator.config import SimulationConfig
from deploy.simulator.result import STAGES, Simulation, queue_depth
from learner.loop.micro_batcher import MicroBatcher
from learner.loop.staleness import StalenessTracker, Verdict
from rollout_workers.pool.dispatch import Dispatch


def simulate(config: SimulationConfig) -> Simulation:
    """Simulate all steps of `config`."""
    run = _Run(config)
    run.run()
    total_s = run.windows[-1][1]
    rollout, teacher, learner = config.rollout, config.teacher, config.learner
    capacity = {
        "rollout": rollout.workers * rollout.concurrency,
        "teacher": teacher.replicas,
        "learner": learner.ranks,
    }
    return Simulation(
        steps=tuple(step_times(run.spans[step], window) for step, window in enumerate(run.windows)),
        tokens=run.tokens,
        evicted=run.tracker.counts["evicted"],
        queues={name: queue_depth(run.waits[name], total_s) for name in STAGES},
        busy={name: queue_depth(run.busy[name], total_s).mean / capacity[name] for name in STAGES},
        spans=tuple(span for spans in run.spans for span in spans),
    )


@dataclass(slots=True)
class _Sample:
    """One answer. `alone_s`: seconds it takes on an idle worker. `at`: when its current stage or wait began."""

    name: str
    step: int
    tokens: int
    alone_s: float
    at: float
    worker: int = 0
    version: int = 0
    spans: list[TraceSpan] = field(default_factory=list)

    def span(self, stage: str, track: str, end: float, **sizes: int) -> None:
        """Record the time in `stage`, from `at` to `end`."""
        self.spans.append(TraceSpan(stage, track, self.at, end, {"sample": f"{self.step}/{self.name}", **sizes}))
        self.at = end


class _Run:
    """State of a run between two events."""

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self.tracker = StalenessTracker(config.max_staleness, config.samples_per_step)
        self.spans: list[list[TraceSpan]] = [[] for _ in range(config.steps)]
        self.windows: list[Interval] = []
        self.waits: dict[str, list[Interval]] = {name: [] for name in STAGES}
        self.busy: dict[str, list[Interval]] = {name: [] for name in STAGES}
        self.tokens = 0
        self._time = Schedule(STAGES, config.interference)
        self._ready: dict[str, _Sample] = {}
        self._dispatch = Dispatch(config.rollout.concurrency)
        self._workers: list[WorkerClock[_Sample]] = [
            WorkerClock(config.rollout.contention) for _ in range(config.rollout.workers)
        ]
        self._wakes = [0] * config.rollout.workers
        for index in range(config.rollout.workers):
            self._dispatch.join(index)
        self._waiting: deque[_Sample] = deque()
        self._engine_version = 0
        self._to_score: deque[_Sample] = deque()
        self._idle = list(range(config.teacher.replicas))
        """Idle replicas, the longest idle first."""
        self._replica_context: list[int | None] = [None] * config.teacher.replicas
        self._rank_free = [0.0] * config.learner.ranks
        self._batcher: MicroBatcher[_Sample] = MicroBatcher(config.learner.ranks, config.learner.micro_batch_tokens)

    def run(self) -> None:
        """Process events until the last step ends."""
        self._fill()
        while len(self.windows) < self.config.steps:
            self._time.next()

    # --- rollout ----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        for _ in range(self.tracker.may_issue()):
            if evicted := self.tracker.evicted():
                name = evicted[0]
                self.tracker.reissue(name)
            else:
                name = str(self.tracker.counts["issued"])
                self.tracker.issue(name)
            self._waiting.append(self._sample(name))
        self._start_waiting()

    def _sample(self, name: str) -> _Sample:
        rollout = self.config.rollout
        rng = np.random.default_rng([self.config.seed, int(name)])
        tokens = max(1, round(rollout.answer_tokens.draw(rng)))
        alone_s = rollout.answer_s + tokens * rollout.token_s.draw(rng)
        return _Sample(name, int(name) // self.config.samples_per_step, tokens, alone_s, at=self._time.now)

    def _start_waiting(self) -> None:
        while self._waiting:
            worker = self._dispatch.start(self._waiting[0].name, 1)
            if worker is None:
                return
            sample = self._waiting.popleft()
            self._end_wait("rollout", sample)
            sample.worker, sample.version = worker, self._engine_version
            self._time.active["rollout"] += 1
            self._workers[worker].add(self._time.clocks["rollout"].now, sample.alone_s, sample)
            self._wake(worker)

    def _wake(self, worker: int) -> None:
        """Schedule the end of the worker's next answer; this cancels the end scheduled before."""
        self._wakes[worker] += 1
        wake, when = self._wakes[worker], self._workers[worker].next_end()
        if when < math.inf:
            self._time.at_work("rollout", when, lambda: self._answered(worker) if wake == self._wakes[worker] else None)

    def _answered(self, worker: int) -> None:
        sample = self._workers[worker].pop(self._time.clocks["rollout"].now)
        self._time.active["rollout"] -= 1
        self._dispatch.end(worker, 1)
        self.busy["rollout"].append((sample.at, self._time.now))
        sizes = {"prompt_tokens": self.config.prompt_tokens, "response_tokens": sample.tokens}
        sample.span("rollout", f"worker {worker}", self._time.now, **sizes)
        self._wake(worker)
        self._start_waiting()
        self._score(sample)

    # --- teacher ----------------------------------------------------------------------------------------------------

    def _score(self, sample: _Sample) -> None:
        """Queue for a replica; an idle one waits `window_s` for more answers."""
        self._to_score.append(sample)
        if self._idle:
            replica = self._idle.pop(0)
            self._time.at(self._time.now + self.config.teacher.window_s, lambda: self._serve(replica))

    def _serve(self, replica: int) -> None:
        """Start the next batch of a replica, in order of arrival."""
        teacher, batch, tokens = self.config.teacher, list[_Sample](), 0
        while self._to_score:
            more = self.config.prompt_tokens + self._to_score[0].tokens
            if batch and tokens + more > teacher.batch_tokens:
                break
            tokens += more
            batch.append(self._to_score.popleft())
        if not batch:  # another replica took the answers
            self._idle.append(replica)
            return
        version = self._engine_version if teacher.context_every_version else 0
        if self._replica_context[replica] != version:
            self._replica_context[replica] = version
            tokens += teacher.context_tokens
        for sample in batch:
            self._end_wait("teacher", sample)
        self._time.active["teacher"] += 1
        end = self._time.clocks["teacher"].now + tokens / teacher.tokens_per_s
        self._time.at_work("teacher", end, partial(self._served, batch, replica, self._time.now))

    def _served(self, batch: list[_Sample], replica: int, started: float) -> None:
        self._time.active["teacher"] -= 1
        self.busy["teacher"].append((started, self._time.now))
        for sample in batch:
            self._time.at(self._time.now + self.config.teacher.request_s, partial(self._scored, sample, replica))
        self._time.at(self._time.now, lambda: self._serve(replica))

    def _scored(self, sample: _Sample, replica: int) -> None:
        sample.span("score", f"teacher {replica}", self._time.now)
        if self.tracker.finish(sample.name, ((0, sample.version),), sample.tokens) is Verdict.READY:
            self._ready[sample.name] = sample
        self._train()
        self._fill()

    # --- learner ----------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Put the samples that the step may take into micro-batches; the last sample closes the step."""
        taken = self.tracker.take()
        for name in taken:
            sample = self._ready.pop(name)
            self.tokens += sample.tokens
            for group in self._batcher.add(self.config.prompt_tokens + sample.tokens, sample):
                self._accumulate(group)
        if taken and not self.tracker.room():
            for group in self._batcher.flush():
                self._accumulate(group)
            self._time.at_work("learner", max(self._time.clocks["learner"].now, *self._rank_free), self._step)

    def _accumulate(self, group: list[list[_Sample]]) -> None:
        learner = self.config.learner
        for rank, batch in enumerate(group):
            if not batch:
                continue
            lengths = [self.config.prompt_tokens + sample.tokens for sample in batch]
            padded = sum(lengths) if learner.packed else len(batch) * max(lengths)
            start = max(self._time.clocks["learner"].now, self._rank_free[rank])
            end = self._rank_free[rank] = start + learner.micro_batch_s + padded / learner.tokens_per_s
            self._time.at_work("learner", start, partial(self._begin_batch, rank, batch, padded, end))

    def _begin_batch(self, rank: int, batch: list[_Sample], padded_tokens: int, end: float) -> None:
        self._time.active["learner"] += 1
        for sample in batch:
            self._end_wait("learner", sample)
            self.spans[self.tracker.version] += sample.spans
        self._time.at_work("learner", end, partial(self._end_batch, rank, padded_tokens, self._time.now))

    def _end_batch(self, rank: int, padded_tokens: int, started: float) -> None:
        self._time.active["learner"] -= 1
        self.busy["learner"].append((started, self._time.now))
        args = {"version": self.tracker.version, "padded_tokens": padded_tokens}
        self.spans[self.tracker.version].append(TraceSpan("accumulate", f"rank {rank}", started, self._time.now, args))

    def _step(self) -> None:
        self._time.active["learner"] += 1
        end = self._time.clocks["learner"].now + self.config.learner.step_s
        self._time.at_work("learner", end, partial(self._stepped, self._time.now))

    def _stepped(self, started: float) -> None:
        self._time.active["learner"] -= 1
        self._controller_span("step", started, self._time.now)
        self.busy["learner"] += [(started, self._time.now)] * self.config.learner.ranks
        self._sync()

    def _sync(self) -> None:
        sync = self.config.sync
        self._time.paused.add("rollout")
        for index, worker in enumerate(self._workers):
            worker.stop(self._time.clocks["rollout"].now)
            self._wake(index)
        self._controller_span("sync", self._time.now, self._time.now + sync.seconds)
        self._time.at(self._time.now + sync.seconds, self._synced)

    def _synced(self) -> None:
        self._engine_version += 1
        self._time.paused.remove("rollout")
        for index, worker in enumerate(self._workers):
            worker.resume(self._time.clocks["rollout"].now)
            self._wake(index)
        end = self._time.now + self.config.sync.parity_s
        self._controller_span("parity", self._time.now, end)
        self._time.at(end + self.config.loop_s, self._step_over)

    def _step_over(self) -> None:
        self.windows.append((self.windows[-1][1] if self.windows else 0.0, self._time.now))
        for name in self.tracker.advance():
            del self._ready[name]
        if len(self.windows) < self.config.steps:
            self._train()
            self._fill()

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def _controller_span(self, stage: str, start: float, end: float) -> None:
        version = self.tracker.version
        self.spans[version].append(TraceSpan(stage, "controller", start, end, {"version": version + 1}))

    def _end_wait(self, queue: str, sample: _Sample) -> None:
        if self._time.now > sample.at:
            self.waits[queue].append((sample.at, self._time.now))
            sample.span(QUEUE, f"{queue} queue", self._time.now)
