"""The loop: sample → score → accumulate → step → publish, strictly on-policy.

::

    prompts ──► rollout workers ──► scored answers ──► filler ──► ranks ──► step ──► publish ──► parity
                (vLLM, then the     (references, as    (micro-    (gradient  (once)   (version    (or the
                 teacher, each       each one ends)     batches)    sums)               n + 1)      run stops)
                 answer by itself)

Inside a step everything overlaps: an answer is scored the moment it ends, a micro-batch is accumulated the moment it
fills. The optimiser step is the only barrier. This process holds ids and object references, never tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
import xxhash

from common.config import Config
from common.data import batch_rows
from common.schema import Prompt, Sampling, TokenSequence, as_ids
from common.telemetry import Span, covered_s
from learner.filling import MicroBatchFiller
from learner.parity import ParityGate, ParityReport
from learner.reports import AccumulateReport, StepReport
from learner.services import Services


class RunError(RuntimeError):
    """The run cannot go on; the text says why and what would help."""


@dataclass
class Clock:
    """Spans of time by stage; a stage's time is what its spans cover, so overlapping work counts once."""

    spans: dict[str, list[Span]] = field(default_factory=dict)

    def add(self, stage: str, start: float, end: float) -> None:
        """Note that `stage` was at work from `start` to `end` (seconds since the epoch)."""
        self.spans.setdefault(stage, []).append((start, end))

    def seconds(self) -> dict[str, float]:
        """Covered seconds by stage."""
        return {stage: covered_s(spans) for stage, spans in self.spans.items()}


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimiser step did."""

    version: int
    metrics: dict[str, Any]
    parity: ParityReport
    seconds: dict[str, float]


class Controller:
    """Runs the steps of one run over started services."""

    def __init__(
        self, config: Config, services: Services, prompts: Sequence[Prompt], status: Callable[[str], None]
    ) -> None:
        self._config = config
        self._services = services
        self._prompts = prompts
        self._status = status
        self._probe: list[TokenSequence] = []
        self._gates: list[ParityGate] = []

    # --- parity -----------------------------------------------------------------------------------------------------

    def begin_parity(self) -> ParityReport:
        """Choose the probe (answers of the engine at version 0) and measure the pair's noise floor on it."""
        sync, info, worker = self._config.sync, self._services.learner_info, self._services.worker_info
        assert info is not None
        assert worker is not None
        prompts = self._prompts[: sync.probe_prompts]
        # Scoring takes the whole sequence as a prompt, and an engine needs room for one more token.
        room = worker.limit_tokens - 1 - max(len(prompt.student_ids) for prompt in prompts)
        sampling = Sampling(max_tokens=min(sync.probe_tokens, room), temperature=1.0, seed=self._config.run.seed)
        answers = self._services.generate([prompt.student_ids.tolist() for prompt in prompts], sampling)
        self._probe = [
            TokenSequence(prompt_ids=prompt.student_ids, response_ids=as_ids(answer.ids))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        nats = sync.parity_nats or (2e-4 if info.dtype == "float32" else 0.1)
        self._gates = [ParityGate(nats, sync.parity_change_ratio) for _ in self._services.workers]
        return self._parity(0)

    def _parity(self, version: int) -> ParityReport:
        """Check every engine against the learner; the worst report. Raises ParityError."""
        engines, learner = self._services.probe(self._probe)
        reports = [
            gate.begin(engine, learner) if version == 0 else gate.check(version, engine, learner)
            for gate, engine in zip(self._gates, engines, strict=True)
        ]
        return max(reports, key=lambda report: report.max_nats)

    # --- one step ---------------------------------------------------------------------------------------------------

    def step(self, step: int) -> StepOutcome:
        """Make the weights of version `step` + 1 out of answers that version `step` gave."""
        clock = Clock()
        started = time.time()
        tokens, sequences, metrics = self._stream(step, clock)
        closing = time.time()
        reports = self._services.finish_step(tokens, sequences)
        report = reports[0]
        clock.add("learner", closing, time.time())
        self._check_finite(step, reports)
        if report.weight_version != step + 1:
            raise RunError(f"the learner holds version {report.weight_version}, the loop expected {step + 1}")
        parity = self._publish(step + 1, clock)
        total = time.time() - started
        seconds = {**clock.seconds(), "total": total}
        return StepOutcome(
            version=step + 1,
            metrics={
                **metrics,
                **report.metrics,
                "tokens_per_s": tokens / total,
                "weight_version": step + 1,
                **{f"parity/{name}": value for name, value in asdict(parity).items()},
                **{f"time/{stage}_s": value for stage, value in seconds.items()},
            },
            parity=parity,
            seconds=seconds,
        )

    def _stream(self, step: int, clock: Clock) -> tuple[int, int, dict[str, Any]]:
        """Rollouts, scores and gradients of one step; (response tokens, sequences, metrics) of what was trained on."""
        config = self._config
        pending = self._issue(step)
        filler: MicroBatchFiller[Any] = MicroBatchFiller(config.learner.ranks, config.learner.micro_batch_tokens)
        running: list[Any] = []
        tokens = sequences = by_length = 0
        failures: list[str] = []
        issued = len(pending)
        while pending:
            ended, _ = ray.wait(list(pending), num_returns=1)
            scored = pending.pop(ended[0])
            summary = ray.get(ended[0])
            clock.add("rollout", summary.rollout_started, summary.rollout_ended)
            clock.add("teacher", summary.score_started, summary.score_ended)
            if summary.error is not None:
                failures.append(f"{summary.sample_id}: {summary.error}")
                self._check_failures(failures, issued)
                continue
            self._check_on_policy(summary, step)
            tokens += summary.response_tokens
            sequences += 1
            by_length += summary.finish_reason == "length"
            for group in filler.add(summary.prompt_tokens + summary.response_tokens, scored):
                running += self._services.accumulate(group)
            self._status(f"step {step + 1}: {issued - len(pending)}/{issued} answers, {tokens} tokens")
        for group in filler.flush():
            running += self._services.accumulate(group)
        self._status(f"step {step + 1}: {tokens} tokens, learning")
        reports: list[AccumulateReport] = ray.get(running)
        for report in reports:
            clock.add("learner", report.started, report.ended)
        if sum(report.sequences for report in reports) != sequences:
            raise RunError(f"step {step}: {sequences} answers were dealt out, the learner saw another number")
        return (
            tokens,
            sequences,
            {
                "rollout/tokens": tokens,
                "rollout/mean_tokens": tokens / max(sequences, 1),
                "rollout/stopped_by_length": by_length / max(sequences, 1),
                "teacher/failed": len(failures),
            },
        )

    def _issue(self, step: int) -> dict[Any, Any]:
        """Start all answers of a step: reference to the summary -> reference to the scored trajectory."""
        config = self._config
        rows = batch_rows(step, batch_size=config.rollout.batch_size, rows=len(self._prompts), seed=config.run.seed)
        issued: dict[Any, Any] = {}
        for place, row in enumerate(rows):
            prompt = self._prompts[row]
            for sample in range(config.rollout.samples_per_prompt):
                sample_id = f"{step}/{place}/{prompt.row_id}/{sample}"
                sampling = Sampling(
                    max_tokens=config.rollout.max_tokens,
                    temperature=config.rollout.temperature,
                    top_p=config.rollout.top_p,
                    top_k=config.loss.top_k,
                    stop=config.rollout.stop,
                    seed=sample_seed(config.run.name, config.run.seed, sample_id),
                )
                summary, scored = self._services.rollout(len(issued), prompt, sample_id, step, sampling)
                issued[summary] = scored
        return issued

    def _check_failures(self, failures: Sequence[str], issued: int) -> None:
        allowed = self._config.teacher.max_failed_fraction * issued
        if len(failures) > allowed:
            raise RunError(
                f"{len(failures)} of {issued} answers could not be scored, more than teacher.max_failed_fraction "
                f"allows ({self._config.teacher.max_failed_fraction}); the last one: {failures[-1]}"
            )

    def _check_finite(self, step: int, reports: Sequence[StepReport]) -> None:
        """A step whose gradient was NaN or infinite was skipped by the learner; too many in a row end the run."""
        skipped, allowed = reports[0].skipped_in_a_row, self._config.learner.max_skipped_steps
        if skipped > allowed:
            samples = sorted({sample for report in reports for sample in report.nonfinite})
            raise RunError(
                f"step {step}: gradient or loss was NaN or infinite for {skipped} steps in a row (learner."
                f"max_skipped_steps is {allowed}); samples of the last one: {', '.join(samples) or 'none by itself'}; "
                "lower learner.lr, or set loss.clip_per_token"
            )

    @staticmethod
    def _check_on_policy(summary: Any, step: int) -> None:
        if any(version != step for _, version in summary.versions):
            raise RunError(
                f"sample {summary.sample_id} was made by weight versions {summary.versions}, step {step} trains on "
                f"version {step} only: a weight sync ran while answers were in flight"
            )

    def publish(self, version: int) -> ParityReport:
        """The learner's weights into every engine as `version`, then the proof that they are there."""
        return self._publish(version, Clock())

    def _publish(self, version: int, clock: Clock) -> ParityReport:
        started = time.time()
        self._status(f"step {version}: weight sync")
        self._services.publish(version)
        published = time.time()
        parity = self._parity(version)
        clock.add("sync", started, time.time())
        clock.add("parity", published, time.time())
        return parity


def sample_seed(run: str, seed: int, sample_id: str) -> int:
    """Seed of one answer: a function of the run, the step, the row and the sample, not of scheduling."""
    return xxhash.xxh32_intdigest(f"{run}/{seed}/{sample_id}".encode()) & 0x7FFFFFFF
