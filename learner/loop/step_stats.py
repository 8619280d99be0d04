"""Counts, metrics and checks of one step. Pure, apart from a log line."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from common.protocol.schema import Sample
from common.telemetry.step_times import StepTimes, step_times
from common.telemetry.trace import TraceSpan
from learner.cluster.services import EpisodeSummary, Prepared
from learner.data.teacher_answers import Replayed
from learner.errors import RunError
from learner.loop.parity import ParityReport
from learner.loop.variety import COMMONEST, commonest_answer
from learner.trainer.reports import AccumulateReport, StepReport
from learner.trainer.token_records import TokenRecord, choose_records

log = logging.getLogger(__name__)

RecordSkipped = Callable[[int, list[dict[str, Any]]], None]
"""Keeps the records (`learner.trainer.skipped_records`) of a step that a NaN cost, given the step's version."""


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout that went through all stages before the learner.

    `item` is the reference to what the learner trains on; `error` is the reason if there is no score; `spans` are the
    times of its stages; `topk_agreement` compares the ids picked by learner and engine; `reward` and `advantage` are
    set in runs with ``loss.reward_weight``.
    """

    sample: Sample
    summary: Any
    item: Any
    error: str | None
    spans: tuple[TraceSpan, ...]
    topk_agreement: float | None = None
    reward: float | None = None
    advantage: float = 0.0

    @property
    def tokens(self) -> int:
        """Prompt + response tokens, of an episode summed over its sequences, which the ranks may split."""
        return int(self.summary.prompt_tokens + self.summary.response_tokens)

    @property
    def dropped(self) -> bool:
        """True if ``context.from_rollout`` left the answer out."""
        context = self.summary.context
        return context is not None and context.context_id is None and context.error is None

    @property
    def context_id(self) -> str | None:
        """Id of the context that was sampled, is the row's own, or was made for the answer."""
        made = self.summary.context
        return self.sample.prompt.context_id if made is None else made.context_id

    @property
    def episode(self) -> EpisodeSummary | None:
        """The game that was played, if the sample is one."""
        found: EpisodeSummary | None = self.summary.episode
        return found

    @property
    def sequences(self) -> int:
        """Sequences for the learner: 1 for an answer, one or more for an episode."""
        return 1 if self.episode is None else self.episode.sequences


def scored_rollout(
    sample: Sample, issued: float, summary: Any, score: Any, item: Any, prepared: Prepared | None = None
) -> ScoredRollout:
    """Join the parts of a rollout that was `issued` at that time, with the spans of its stages for the trace."""
    args = {"sample": sample.sample_id}
    spans = []
    if not isinstance(summary, Replayed):
        sizes = {"prompt_tokens": summary.prompt_tokens, "response_tokens": summary.response_tokens}  # for simulations
        spans += [
            TraceSpan("queue", "controller", issued, summary.started, args),
            TraceSpan("rollout", f"worker {summary.worker}", summary.started, summary.ended, {**args, **sizes}),
        ]
    if summary.context is not None:
        spans.append(
            TraceSpan("context", f"worker {summary.worker}", summary.context.started, summary.context.ended, args)
        )
    if prepared is not None:
        spans.append(replace(prepared.span, args=args))
    if score is not None:
        spans.append(TraceSpan("score", "teacher", score.started, score.ended, args))
    agreement = None if prepared is None else prepared.agreement
    error = summary.context.error if summary.context is not None else None
    return ScoredRollout(sample, summary, item, error or (score and score.error), tuple(spans), agreement)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """Result of one optimiser step. `trained`, `failed` and `dropped` are sample ids, `contexts` the ids of contexts of
    `trained` (runs with several contexts), `tokens` a few answers token by token.
    """

    version: int
    trained: tuple[str, ...]
    failed: tuple[str, ...]
    contexts: tuple[str, ...]
    metrics: dict[str, Any]
    parity: ParityReport
    times: StepTimes
    spans: list[TraceSpan]
    tokens: tuple[TokenRecord, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass
class StepStats:
    """Totals over the rollouts that a step trains on. `tokens` and `sequences` are what the ranks must count too."""

    tokens: int = 0
    """Response tokens, including what an environment said in a conversation."""
    student_tokens: int = 0
    sequences: int = 0
    stopped_by_length: int = 0
    sample_ids: list[str] = field(default_factory=list)
    context_ids: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Sample id -> reason for the missing score."""
    dropped: list[str] = field(default_factory=list)
    """Samples that ``context.from_rollout`` left out."""
    agreements: list[float] = field(default_factory=list)
    from_teacher: int = 0
    by_set: Counter[str] = field(default_factory=Counter)
    """Rollouts by the name of their row's set."""
    prompts_by_answer: dict[int, set[str]] = field(default_factory=dict)
    """Rows by the digest of the student's answer."""
    rewards: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    episodes: list[EpisodeSummary] = field(default_factory=list)
    spans: list[TraceSpan] = field(default_factory=list)

    def add(self, rollout: ScoredRollout) -> None:
        """Count one more rollout."""
        self.tokens += rollout.summary.response_tokens
        self.student_tokens += rollout.summary.student_tokens
        self.sequences += rollout.sequences
        self.from_teacher += rollout.sample.from_teacher
        self.by_set[rollout.sample.data_set] += 1
        self.stopped_by_length += rollout.summary.finish_reason == "length"
        if not rollout.sample.from_teacher:
            self.prompts_by_answer.setdefault(rollout.summary.answer, set()).add(rollout.sample.prompt.row_id)
        self.sample_ids.append(rollout.sample.sample_id)
        if rollout.context_id is not None:
            self.context_ids.append(rollout.context_id)
        if rollout.episode is not None:
            self.episodes.append(rollout.episode)
        if rollout.topk_agreement is not None:
            self.agreements.append(rollout.topk_agreement)
        if rollout.reward is not None:
            self.rewards.append(rollout.reward)
            self.advantages.append(rollout.advantage)
        self.spans += rollout.spans

    def add_passes(self, step: int, ranks: int, reports: Sequence[AccumulateReport]) -> None:
        """Add the ranks' micro-batches. Raises RunError if they saw another number of sequences than was dealt out."""
        for index, report in enumerate(reports):
            args = {"version": step, "padded_tokens": report.padded_tokens, "samples": report.samples}
            self.spans.append(TraceSpan("accumulate", f"rank {index % ranks}", report.started, report.ended, args))
        seen = sum(report.sequences for report in reports)
        if seen != self.sequences:
            raise RunError(f"step {step}: {self.sequences} sequences were dealt out, the learner saw {seen}")

    @property
    def answers(self) -> int:
        """Rollouts so far."""
        return len(self.sample_ids)

    def outcome(
        self,
        *,
        version: int,
        during: tuple[float, float],
        reports: Sequence[StepReport],
        parity: ParityReport,
        metrics: Mapping[str, Any],
        max_token_samples: int,
    ) -> StepOutcome:
        """The step's result, its metrics with those of the ranks and `metrics`; `during` is (start, end) in seconds."""
        times = step_times(self.spans, during)
        return StepOutcome(
            version=version,
            trained=tuple(self.sample_ids),
            failed=tuple(self.failures),
            dropped=tuple(self.dropped),
            contexts=tuple(self.context_ids),
            metrics={
                **self.metrics(),
                **reports[0].metrics,
                **metrics,
                "tokens_per_s": self.student_tokens / (during[1] - during[0]),
                **speeds(self.student_tokens, times.stage_s),
                "weight_version": version,
                **{f"parity/{name}": value for name, value in asdict(parity).items()},
                **{f"time/{stage}_s": value for stage, value in times.stage_s.items()},
                "time/total_s": times.total_s,
                **times.metrics(),
            },
            parity=parity,
            times=times,
            spans=self.spans,
            tokens=choose_records((one for report in reports for one in report.token_records), max_token_samples),
        )

    def metrics(self) -> dict[str, float]:
        """Means over the answers, or over the episodes."""
        played = self.episodes
        return {
            "rollout/tokens": self.student_tokens,
            "rollout/mean_tokens": self.student_tokens / max(self.answers, 1),
            "rollout/stopped_by_length": self.stopped_by_length / max(self.answers, 1),
            "teacher/failed": len(self.failures),
            **({} if (share := commonest_answer(self.prompts_by_answer)) is None else {COMMONEST: share}),
            **{
                f"env/{name}": sum(float(getattr(one, name)) for one in played) / len(played)
                for name in ("success", "reward", "turns")
                if played
            },
            **({"reward/mean": statistics.fmean(self.rewards)} if self.rewards else {}),
            **({"reward/signal": statistics.fmean(map(bool, self.advantages))} if self.rewards else {}),
            **({"context/distinct": len(set(self.context_ids))} if self.context_ids else {}),
            **({"topk_agreement": sum(self.agreements) / len(self.agreements)} if self.agreements else {}),
        }


def speeds(tokens: int, stage_s: Mapping[str, float]) -> dict[str, float]:
    """``tokens_per_s/STAGE`` while the stage was at work, for stages that process every token."""
    seconds = {stage: stage_s.get(stage, 0.0) for stage in ("rollout", "score", "accumulate")}
    return {f"tokens_per_s/{stage}": tokens / value for stage, value in seconds.items() if value}


def check_step(
    step: int, reports: Sequence[StepReport], trained: Sequence[str], max_skipped: int, record_skipped: RecordSkipped
) -> None:
    """Raises RunError if the learner holds another version than the loop, or skipped more than `max_skipped` steps in a
    row: for a NaN or infinite gradient, or for want of a token to learn from. Records each skipped step.
    """
    report = reports[0]
    if report.weight_version != step + 1:
        raise RunError(f"the learner holds version {report.weight_version}, the loop expected {step + 1}")
    if report.uncounted and not trained:
        log.warning("step %d was skipped: every answer failed or was left out by context.from_rollout", step + 1)
        if report.uncounted_in_a_row > max_skipped:
            raise RunError(
                f"step {step}: no answer was left to train on, for {report.uncounted_in_a_row} steps in a row "
                f"(learner.max_skipped_steps is {max_skipped}): all failed, or context.from_rollout left them out"
            )
    elif report.uncounted:
        log.warning("step %d was skipped, %s", step + 1, report.uncounted)
        if report.uncounted_in_a_row > max_skipped:
            raise RunError(
                f"step {step}: {report.uncounted}, for {report.uncounted_in_a_row} steps in a row "
                f"(learner.max_skipped_steps is {max_skipped}); lower loss.skip_first_tokens, or have the student "
                "answer at greater length"
            )
    elif report.skipped_in_a_row:
        record_skipped(step + 1, [record for one in reports for record in one.skipped_records] or _suspects(trained))
        if report.skipped_in_a_row > max_skipped:
            samples = sorted({sample for one in reports for sample in one.nonfinite})
            raise RunError(
                f"step {step}: gradient or loss was NaN or infinite for {report.skipped_in_a_row} steps in a row "
                f"(learner.max_skipped_steps is {max_skipped}); samples of the last one: "
                f"{', '.join(samples) or 'none by itself'} (see skipped/); lower learner.lr, or set "
                "loss.clip_per_token"
            )


def _suspects(samples: Sequence[str]) -> list[dict[str, Any]]:
    """Records for a step with finite losses and a non-finite gradient: any of its samples may be the reason."""
    why = "the gradient of the step was NaN or infinite, the loss of no sample was"
    return [{"sample_id": sample, "why": why} for sample in samples]
