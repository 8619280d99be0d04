"""The loop: sample → score → accumulate → step → publish.

::

    prompts ──► rollout workers ──► scored answers ──► filler ──► ranks ──► step ──► publish ──► parity
                (vLLM, then the     (references, as    (micro-    (gradient  (once)   (version    (or the
                 teacher, each       each one ends)     batches)    sums)               n + 1)      run stops)
                 answer by itself)

Inside a step everything overlaps: an answer is scored the moment it ends, a micro-batch is accumulated the moment it
fills. The optimiser step is the only barrier. This process holds ids and object references, never tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from common.async_utils import all_of, run_in_background
from common.config.model import Config
from common.protocol.schema import Prompt
from common.telemetry.step_times import StepTimes, step_times
from common.telemetry.trace import TraceSpan
from learner.cluster.services import EpisodeSummary, Services
from learner.data.samples import Draw, SampleSource
from learner.data.teacher_answers import Offline
from learner.errors import RunError
from learner.loop.micro_batcher import MicroBatchFiller
from learner.loop.parity import ParityReport
from learner.loop.rollout_pipeline import RolloutPipeline, ScoredRollout
from learner.loop.weight_publisher import Publisher
from learner.trainer.reports import AccumulateReport, StepReport
from learner.trainer.token_records import TokenRecord, first_records

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimiser step did; `spans` are its work, `times` where its time went, `trained` and `failed` the ids of
    its samples.
    """

    version: int
    trained: tuple[str, ...]
    failed: tuple[str, ...]
    contexts: tuple[str, ...]
    """Of a run with a pool: id of the context of each of `trained`."""
    metrics: dict[str, Any]
    parity: ParityReport
    times: StepTimes
    spans: list[TraceSpan]
    tokens: tuple[TokenRecord, ...] = ()
    """A few of its answers token by token."""


@dataclass
class _Trained:
    """What a step was trained on."""

    tokens: int = 0
    """Of all responses: what the ranks count."""
    student_tokens: int = 0
    """Of these, what the student made: an environment speaks in the response, too, where it is a conversation."""
    sequences: int = 0
    """What the ranks count: an answer is one, an episode may be several."""
    by_length: int = 0
    sample_ids: list[str] = field(default_factory=list)
    context_ids: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Sample -> why it has no score."""
    agreements: list[float] = field(default_factory=list)
    episodes: list[EpisodeSummary] = field(default_factory=list)
    spans: list[TraceSpan] = field(default_factory=list)

    def add(self, answered: ScoredRollout) -> None:
        """One more answer."""
        self.tokens += answered.summary.response_tokens
        self.student_tokens += answered.summary.student_tokens
        self.sequences += answered.sequences
        self.sample_ids.append(answered.sample.sample_id)
        if answered.sample.prompt.context_id is not None:
            self.context_ids.append(answered.sample.prompt.context_id)
        if answered.episode is not None:
            self.episodes.append(answered.episode)
        self.by_length += answered.summary.finish_reason == "length"
        self.spans += answered.spans
        if answered.topk_agreement is not None:
            self.agreements.append(answered.topk_agreement)

    @property
    def answers(self) -> int:
        """How many."""
        return len(self.sample_ids)

    def metrics(self) -> dict[str, float]:
        """Means over the answers, or over the episodes."""
        played = self.episodes
        return {
            "rollout/tokens": self.student_tokens,
            "rollout/mean_tokens": self.student_tokens / max(self.answers, 1),
            "rollout/stopped_by_length": self.by_length / max(self.answers, 1),
            "teacher/failed": len(self.failures),
            **{
                f"env/{name}": sum(float(getattr(one, name)) for one in played) / len(played)
                for name in ("success", "reward", "turns")
                if played
            },
            **({"context/distinct": len(set(self.context_ids))} if self.context_ids else {}),
            **({"topk_agreement": sum(self.agreements) / len(self.agreements)} if self.agreements else {}),
        }


class Controller:
    """Runs the steps of one run over started services, on one event loop: `begin`, `step` by step, `close`."""

    def __init__(
        self,
        config: Config,
        services: Services,
        prompts: Sequence[Prompt],
        status: Callable[[str], None],
        skipped: Callable[[int, list[dict[str, Any]]], None] = lambda step, records: None,
        draw: Draw | None = None,
        offline: Offline | None = None,
    ) -> None:
        """`status` hears what goes on; `skipped` of each step that a NaN cost, and what broke it (`skipped_records`).
        `draw` gives a sample its context, where each has one of its own; `offline` its answer, where those of the
        teacher are trained on.
        """
        self._config = config
        self._services = services
        self._prompts = prompts
        self._status = status
        self._skipped = skipped
        self._source = SampleSource(config, prompts, draw)
        self._publisher = Publisher(config, services, status)
        self._offline = offline
        self._stream: RolloutPipeline | None = None

    async def begin_parity(self) -> ParityReport:
        """Join learner and engines, which hold the initial weights; measure what they differ by."""
        return await self._publisher.begin(self._prompts)

    async def begin(self, version: int, position: Mapping[str, Any] | None = None) -> None:
        """Start at `version`: 0, or one that the learner has loaded, at the `position` of the run that saved it."""
        if version:
            await self._publisher.publish(version)
        where = position or {"next": version * self._source.per_step, "again": []}
        self._stream = RolloutPipeline(
            self._config, self._services, self._source, version, where["next"], where["again"], self._offline
        )

    def position(self) -> dict[str, Any]:
        """Where a run that resumes here begins, as JSON values; call it between steps."""
        return self._running.position()

    async def close(self) -> None:
        """Give up the answers under way."""
        if self._stream is not None:
            await self._stream.close()

    @property
    def _running(self) -> RolloutPipeline:
        if self._stream is None:
            raise RuntimeError("the controller was used before begin")
        return self._stream

    # --- one step ---------------------------------------------------------------------------------------------------

    async def step(self, step: int) -> StepOutcome:
        """Make the weights of version `step` + 1."""
        started = time.time()
        pool = self._services.pool
        workers = len(pool.members)
        async with run_in_background(pool.watch(), self._services.teachers.watch(), self.keep_workers(step)):
            trained = await self._train(step)
        closing = time.time()
        reports = await self._services.finish_step(trained.tokens, trained.sequences)
        if self._config.rollout.colocated:
            await self._services.wake()
        trained.spans.append(TraceSpan("step", "rank 0", closing, time.time(), {"version": step + 1}))
        self._check(step, reports, trained.sample_ids)
        self._services.leave_nodes_that_go()
        parity = await self._publisher.publish(step + 1)
        staleness = self._running.tracker.metrics()
        self._running.advance()
        ended = time.time()
        spans = [*trained.spans, *self._publisher.spans]
        self._publisher.spans.clear()
        times = step_times(spans, (started, ended))
        return StepOutcome(
            version=step + 1,
            trained=tuple(trained.sample_ids),
            failed=tuple(trained.failures),
            contexts=tuple(trained.context_ids),
            metrics={
                **trained.metrics(),
                **reports[0].metrics,
                **staleness,
                "rollout/workers": workers,
                "rollout/restarts": pool.restarts,
                "rollout/reissued": pool.reissued,
                "tokens_per_s": trained.student_tokens / (ended - started),
                **speeds(trained.student_tokens, times.stage_s),
                "weight_version": step + 1,
                **{f"parity/{name}": value for name, value in asdict(parity).items()},
                **{f"time/{stage}_s": value for stage, value in times.stage_s.items()},
                "time/total_s": times.total_s,
                **times.metrics(),
            },
            parity=parity,
            times=times,
            spans=spans,
            tokens=first_records((one for r in reports for one in r.tokens), self._config.run.token_samples),
        )

    async def _train(self, step: int) -> _Trained:
        """Rollouts, scores and gradients of one step."""
        config, trained = self._config, _Trained()
        filler: MicroBatchFiller[Any] = MicroBatchFiller(config.learner.ranks, config.learner.micro_batch_tokens)
        running: list[Any] = []
        async for answered in self._answers(trained):
            trained.add(answered)
            for group in filler.add(answered.tokens, answered.item):
                running += self._services.accumulate(group)
            so_far = f"{trained.answers}/{self._source.per_step} answers, {trained.student_tokens} tokens"
            self._status(f"step {step + 1}: {so_far}")
        for group in filler.flush():
            running += self._services.accumulate(group)
        self._status(f"step {step + 1}: {trained.student_tokens} tokens, learning")
        reports: list[AccumulateReport] = await all_of(running)
        ranks = config.learner.ranks
        for index, report in enumerate(reports):
            track = f"rank {index % ranks}"
            args = {"version": step, "padded_tokens": report.padded_tokens}
            trained.spans.append(TraceSpan("accumulate", track, report.started, report.ended, args))
        seen = sum(report.sequences for report in reports)
        if seen != trained.sequences:
            raise RunError(f"step {step}: {trained.sequences} sequences were dealt out, the learner saw {seen}")
        return trained

    async def _answers(self, trained: _Trained) -> AsyncIterator[ScoredRollout]:
        """The step's answers as they come; or all together in the order of their numbers, where arrival must not matter
        or learner and engines take turns.
        """

        def failed(answered: ScoredRollout) -> None:
            trained.failures[answered.sample.sample_id] = str(answered.error)
            self._check_failures(trained.failures)

        answers = self._running.step(failed)
        colocated = self._config.rollout.colocated
        if not self._config.learner.deterministic and not colocated:
            async for answered in answers:
                yield answered
            return
        everything = sorted([answered async for answered in answers], key=lambda one: one.sample.number)
        if colocated:
            await self._services.sleep()  # from here to the end of the step the GPUs are the learner's
        for answered in everything:
            yield answered

    async def keep_workers(self, version: int) -> None:
        """For ever: where every worker was lost, the first replacement takes part at once, with `version`, not at the
        next step. Run it with `run_in_background`, around code that waits for answers.
        """
        while True:
            await self._services.pool.only_replacements()
            await self._publisher.publish(version)

    def _check_failures(self, failures: Mapping[str, str]) -> None:
        issued, share = self._source.per_step, self._config.teacher.max_failed_fraction
        if len(failures) > share * issued:
            raise RunError(
                f"{len(failures)} of {issued} answers could not be scored, more than teacher.max_failed_fraction "
                f"allows ({share}); the last one: {': '.join(list(failures.items())[-1])}"
            )

    def _check(self, step: int, reports: Sequence[StepReport], trained: Sequence[str]) -> None:
        """The learner is where the loop is; a gradient that was NaN or infinite too often in a row ends the run, and so
        do steps in a row that had nothing to learn from.
        """
        report, allowed = reports[0], self._config.learner.max_skipped_steps
        if report.weight_version != step + 1:
            raise RunError(f"the learner holds version {report.weight_version}, the loop expected {step + 1}")
        if report.uncounted:
            log.warning("step %d was skipped, %s", step + 1, report.uncounted)
            if report.uncounted_in_a_row > allowed:
                raise RunError(
                    f"step {step}: {report.uncounted}, and so it was for {report.uncounted_in_a_row} steps in a row "
                    f"(learner.max_skipped_steps is {allowed}); lower loss.skip_first_tokens, or have the student "
                    "answer at greater length"
                )
        elif report.skipped_in_a_row:
            self._check_skipped(step, reports, trained)

    def _check_skipped(self, step: int, reports: Sequence[StepReport], trained: Sequence[str]) -> None:
        row, allowed = reports[0].skipped_in_a_row, self._config.learner.max_skipped_steps
        self._skipped(step + 1, [record for one in reports for record in one.records] or _suspects(trained))
        if row > allowed:
            samples = sorted({sample for one in reports for sample in one.nonfinite})
            raise RunError(
                f"step {step}: gradient or loss was NaN or infinite for {row} steps in a row "
                f"(learner.max_skipped_steps is {allowed}); samples of the last one: "
                f"{', '.join(samples) or 'none by itself'} (see skipped/); lower learner.lr, or set "
                "loss.clip_per_token"
            )


def _suspects(samples: Sequence[str]) -> list[dict[str, Any]]:
    """In place of what broke a step, where every loss was finite and the gradient was not: any of its `samples` may."""
    why = "the gradient of the step was NaN or infinite, the loss of no sample was"
    return [{"sample_id": sample, "why": why} for sample in samples]


def speeds(tokens: int, stage_s: Mapping[str, float]) -> dict[str, float]:
    """``tokens_per_s/STAGE`` while the stage was at work, for those that go through every token."""
    seconds = {stage: stage_s.get(stage, 0.0) for stage in ("rollout", "score", "accumulate")}
    return {f"tokens_per_s/{stage}": tokens / value for stage, value in seconds.items() if value}
