"""The life of a run: start or resume services, train, evaluate, save, and write the summary on every way out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from common.async_utils import run_in_background
from common.config.gpus import is_part, reserved_gpus
from common.config.model import Config, ConfigError, LossConfig
from common.data.rendered_checks import length_faults
from common.data.rendering import teacher_sequence
from common.data.rows import DataError
from common.protocol.schema import Sample
from common.protocol.scoring import ScorerFactory
from common.sizing.memory import CUDA_BYTES, length_fault
from common.sizing.model_size import read_model_size
from common.telemetry.kept_steps import TOKEN_STEPS, keeps_details, keeps_trace
from common.telemetry.run_files import Progress, RunFiles, write_json
from common.telemetry.trace import TraceFile
from common.weight_sync.collective import SyncError
from learner.cluster.services import Services
from learner.data.inputs import Inputs
from learner.data.prompts import LazyPrompts
from learner.data.teacher_answers import open_teacher_answers
from learner.errors import ServiceLost
from learner.evaluation.held_out import HeldOutEvaluator
from learner.evaluation.summary import RunSummary, stage_line, step_line, summary_json
from learner.loop.checkpoints import (
    LEARNER,
    Identity,
    Manifest,
    identity_of,
    refuse_other_run,
)
from learner.loop.cut_answers import CutAnswers
from learner.loop.kl_alarm import KlAlarm
from learner.loop.mismatch import MismatchGate, mismatch_bounds
from learner.loop.run_saves import RunSaves
from learner.loop.step_stats import StepOutcome
from learner.loop.support_alarm import SupportAlarm
from learner.loop.teacher_check import check_teachers
from learner.loop.training_loop import TrainingLoop
from learner.loop.user_errors import known_error, outcome_of, unwrap_ray_error
from learner.loop.variety import COMMONEST, Variety
from learner.loop.weight_publisher import WeightPublisher
from learner.trainer.token_records import TokenRecordFiles

RESUME_PLACEMENT_TIMEOUT_S = 600.0
"""Time that a resumed run waits for its GPUs: a lost node may have to be replaced first."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to resume; with `accept_changes` even if another run wrote it."""

    path: Path
    manifest: Manifest
    accept_changes: bool = False


class Run:
    """One run, from started services to its summary."""

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        files: RunFiles,
        trace: TraceFile,
        progress: Progress,
        resumed: Resumed | None = None,
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._files = files
        self._trace = trace
        self._progress = progress
        self._services = Services(config)
        self._loop: TrainingLoop | None = None
        self._teacher_answers = open_teacher_answers(config, inputs)
        self._alarm = KlAlarm(config.learner.kl_alarm_ratio)
        self._support_alarm = SupportAlarm() if "raw" in _forms(config) else None
        self._resumed = resumed
        self._began = time.time()
        self._cut_answers = CutAnswers(config.rollout.max_tokens)
        self._variety = Variety()
        self._part = 1 if resumed is None else resumed.manifest.loop["part"] + 1
        self.summary = RunSummary(planned_steps=config.learner.steps)
        self._held_out = HeldOutEvaluator(
            config, self._services, inputs, files, progress, self.summary, self._keep_workers
        )
        self._saves = RunSaves(config, self._services, progress, self.summary, self._manifest)
        self._position: dict[str, Any] | None = None
        """Position in the samples after the last whole step of this process; None before one."""
        self._token_files = TokenRecordFiles(files, config.student.model, inputs.contexts)
        if resumed is None:
            self._token_files.add_questions(inputs.eval)
        else:
            self.summary.restore(resumed.manifest.loop["summary"])
            self._saves.forget_other_best()

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, train, evaluate, save. Always stops the services and writes the summary.

        A cancelled run (Ctrl-C) saves the weights of its last whole step.
        """
        try:
            await self._start()
            await self._train()
            await self._finish()
            self.summary.outcome = "finished"
        except asyncio.CancelledError:
            self.summary.outcome = "interrupted"
            self._progress.line(f"interrupted after {self.summary.steps} of {self._config.learner.steps} steps")
            if self._position is not None:
                await self._saves.interrupted()
            elif self._resumed is not None:
                self._progress.line(self._saves.how_to_resume())
            raise
        except Exception as error:
            shown = known_error(await user_facing_error(error, self._services), self._config.run.path)
            self.summary.outcome = outcome_of(shown)
            if self._position is not None:
                await self._saves.failed(shown)
            if shown is error:
                raise
            raise shown from error
        finally:
            self._progress.status("stopping")
            self._count_total()
            write_json(self._config.run.path / "summary.json", summary_json(self.summary))
            if self._loop is not None:
                await self._loop.close()
            self._services.close()
            if self._teacher_answers is not None:
                self._teacher_answers.close()

    async def _start(self) -> None:
        started = time.time()
        self._progress.status("reserving GPUs")
        timeout_s = RESUME_PLACEMENT_TIMEOUT_S if self._resumed else 0.0
        if (warning := self._services.reserve(placement_timeout_s=timeout_s)) is not None:
            self._progress.line(f"WARNING: {warning}")
        await self._evaluate_larger_teacher()
        scorer = await self._start_services()
        await self._collect_teacher_answers()  # with the initial weights, unless a larger teacher made them
        publisher = WeightPublisher(self._config, self._services, self._progress.status)
        parity = await publisher.begin(self._inputs.train)
        if scorer is not None:
            self._progress.status("checking the teacher's scores")
            await check_teachers(self._config, self._services, scorer, self._inputs.contexts, publisher.probe)
        loop = self._loop = TrainingLoop(
            self._config,
            self._services,
            publisher,
            self._inputs.train,
            self._progress.status,
            partial(write_skipped, self._config.run.path / "skipped", self._progress.line),
            self._inputs.context_sampler,
            self._teacher_answers,
            self._inputs.set_sizes,
        )
        self.summary.parity_max_nats = max(self.summary.parity_max_nats, parity.max_nats)
        self.summary.add_seconds({"start": time.time() - started})
        self._progress.line(
            f"started in {time.time() - started:.0f} s; engine and learner agree to {parity.max_nats:.1e} nats"
        )
        if (off := await self._services.clock_warning()) is not None:
            self._progress.line(f"WARNING: {off}")
        self._services.invite_workers()
        if self._resumed is not None:
            await self._services.load_state(str((self._resumed.path / LEARNER).absolute()))
            await loop.begin(self.summary.steps, self._resumed.manifest.loop["position"])
            steps = f"{self.summary.steps} of {self._config.learner.steps} steps"
            self._progress.line(f"resumed from {self._resumed.path}: {steps}")
            return
        await loop.begin(0)
        await self._held_out.before()
        if self._config.answering_model == self._config.student.model:
            await self._held_out.in_context()
        self._held_out.warn_if_no_gap()

    async def _evaluate_larger_teacher(self) -> None:
        """If the teacher is another model, load it into engines first, for accuracy in context and stored answers."""
        model, services = self._config.answering_model, self._services
        to_evaluate = self._resumed is None and bool(self._inputs.eval)
        to_answer = self._teacher_answers is not None and bool(self._teacher_answers.missing())
        if model in (None, self._config.student.model) or not (to_evaluate or to_answer):
            return
        self._progress.line(f"starting {model}, which sees the context")
        await services.start_workers(str(model), None, self._config.rollout.workers if to_answer else 1)
        if to_evaluate:
            await self._held_out.in_context()
        await self._collect_teacher_answers()
        services.close_workers()

    async def _start_services(self) -> ScorerFactory | None:
        """Start teachers, ranks and engines, and check that they fit together. Returns the factory of scorers."""
        config, inputs, services = self._config, self._inputs, self._services
        self._progress.line(f"starting {self._what_starts()}; this takes about a minute for the demo")
        services.teachers.begin(services.placement)
        ranks = services.begin_ranks()
        trained = inputs.facts["data.train"]
        async with run_in_background(self._progress.waiting("loading the teacher, and the learner next to it")):
            scorer = await services.teachers.connect(
                inputs.contexts,
                tokenizer_fingerprint=inputs.tokenizer_fingerprint,
                added_tokens=inputs.added_tokens,
                longest_tokens=max(row.teacher_tokens for row in trained) + config.rollout.max_tokens,
            )
        for name, page in services.teachers.metrics_pages().items():
            self._files.relay_metrics(name, page)
        limit = ("the teacher's limit", services.teachers.longest_tokens or inputs.student_limit)
        faults = length_faults(
            "data.train: ",
            "teacher",
            {row.row_id: row.teacher_tokens for row in trained},
            answer=("rollout.max_tokens", config.rollout.max_tokens),
            limit=limit,
        )
        if faults:
            raise DataError("\n".join(faults))
        if isinstance(inputs.train, LazyPrompts):  # rows that were not checked yet
            inputs.train.limits["teacher"] = limit
        if self._resumed is not None:
            refuse_changes(config, inputs, self._resumed, services.teachers.fingerprints())
        shared = any(map(is_part, reserved_gpus(config.learner, config.rollout, config.named_teachers()).values()))
        async with run_in_background(self._progress.waiting("loading the learner and the rollout engines")):
            if shared:  # vLLM takes what a starting neighbour allocates for its own use, so the learner loads first
                await services.wait_ranks(ranks)
            await services.start_workers(config.student.model, scorer, config.rollout.workers)
            if not shared:
                await services.wait_ranks(ranks)
        if config.teacher.kind == "base":
            await services.give_contexts(inputs.contexts)
        info = services.learner_info
        assert info is not None
        if info.unpacked:
            self._progress.line(f"WARNING: learner.packing: sequences are padded, not packed: {info.unpacked}")
        longest = max(row.student_tokens for row in trained) + config.rollout.max_tokens
        if (warning := check_longest(config, info.memory_bytes, longest)) is not None:
            self._progress.line(f"WARNING: {warning}")
        check_exact(config.loss, info.vocab_size, services.teachers.vocab_sizes())
        self._mismatch = MismatchGate(
            mismatch_bounds(config.sync, dtype=info.dtype, max_staleness=config.rollout.max_staleness)
        )
        return scorer

    def _what_starts(self) -> str:
        """The services that this run starts."""
        teachers = [t for t in self._config.named_teachers().values() if t.url is None and t.kind != "base"]
        counts = {
            "teacher": len(teachers),
            "learner rank": self._config.learner.ranks,
            "rollout engine": self._config.rollout.workers,
        }
        return ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count)

    async def _collect_teacher_answers(self) -> None:
        """Have the running engines make the missing teacher's answers (``rollout.source: teacher``)."""
        if self._teacher_answers is None or not self._teacher_answers.missing():
            return
        started, services = time.time(), self._services

        async def answer(sample: Sample, prompt_ids: Sequence[int]) -> Any:
            (text,) = await services.generate([(prompt_ids, sample.sampling)])
            return text

        async with run_in_background(services.admit_replacements()):
            await self._teacher_answers.collect(
                lambda sample: teacher_sequence(sample.prompt, self._inputs.contexts), answer, self._progress.status
            )
        self.summary.add_seconds({"teacher answers": time.time() - started})
        self._progress.line(f"the teacher's answers are in {self._config.answers_path}")

    async def _train(self) -> None:
        assert self._loop is not None
        self._saves.schedule.begin()
        async for outcome in self._loop.steps(self.summary.steps):
            self._position = self._loop.position()
            self._record(outcome)
            await self._validate(outcome.version)
            await self._saves.after_step(outcome.version)

    def _record(self, outcome: StepOutcome) -> None:
        summary = self.summary
        summary.steps = outcome.version
        summary.kl.append(outcome.metrics["kl/lower_bound"])
        summary.parity_max_nats = max(summary.parity_max_nats, outcome.parity.max_nats)
        summary.add_times(outcome.times)
        self._files.metrics(outcome.version, {**outcome.metrics, "run/part": self._part})
        self._files.audit(outcome.version, outcome.trained, outcome.failed, outcome.contexts, outcome.dropped)
        if keeps_details(outcome.version, TOKEN_STEPS):
            self._token_files.add_records(outcome.version, outcome.tokens)
        rollout = self._config.rollout
        if keeps_trace(outcome.version, rollout.batch_size * rollout.samples_per_prompt):
            self._trace.write(outcome.spans)
        left_s = (summary.planned_steps - summary.steps) * summary.times.total_s / summary.steps
        self._progress.line(step_line(outcome.version, summary.planned_steps, outcome.metrics, left_s))
        if self._progress.verbose:
            self._progress.line(stage_line(outcome.metrics))
        for warning in (
            self._cut_answers.observe(outcome.metrics["rollout/stopped_by_length"]),
            self._variety.observe(outcome.metrics.get(COMMONEST)),
            self._mismatch.check(outcome.version, outcome.metrics),
            self._alarm.observe(outcome.metrics["kl/lower_bound"]),
            self._support_alarm and self._support_alarm.observe(outcome.metrics["mass/student_topk"]),
        ):
            if warning is not None:
                self._progress.line(f"WARNING: {warning}")

    async def _validate(self, version: int) -> None:
        """Measure accuracy on ``data.valid``, which alone chooses ``best/``; a tie keeps the earlier step."""
        config, best = self._config, self.summary.best
        if not config.eval.every or (version % config.eval.every and version < config.learner.steps):
            return
        found = await self._held_out.accuracy("valid", version, self._inputs.valid)
        if found is not None and (best is None or found.accuracy > best.accuracy):
            await self._saves.best(version, found.accuracy)

    def _manifest(self) -> Manifest:
        """Describe the last whole step for a checkpoint."""
        assert self._position is not None
        self._count_total()
        return Manifest(
            step=self.summary.steps,
            identity=_identity(self._config, self._inputs, self._services.teachers.fingerprints()),
            loop={
                "summary": self.summary.state(),
                "position": self._position,
                "trace_bytes": self._trace.size(),
                "part": self._part,
            },
        )

    def _count_total(self) -> None:
        """Add this process's time since the last call to the run's."""
        now = time.time()
        self.summary.add_seconds({"total": now - self._began})
        self._began = now

    async def _finish(self) -> None:
        await self._held_out.after(self.summary.steps)
        self._progress.status("saving")
        await self._saves.at_end()

    def _keep_workers(self, version: int) -> Coroutine[Any, Any, None]:
        """Background work of an evaluation: replace dead workers by ones with the evaluated weights."""
        if self._loop is None:
            return self._services.admit_replacements()
        return self._loop.keep_workers(version)


def _forms(config: Config) -> set[str]:
    return {config.loss.form, *(config.loss.of_mixed(one).form for one in config.mixed_losses().values())}


def refuse_changes(config: Config, inputs: Inputs, resumed: Resumed, teachers: dict[str, str]) -> None:
    """Raise CheckpointError if the checkpoint belongs to another run; `teachers` are fingerprints by name.

    Before the teachers run, the checkpoint's own fingerprints stand for them, so that all else is compared at once.
    """
    if not resumed.accept_changes:
        refuse_other_run(resumed.manifest, resumed.path, _identity(config, inputs, teachers))


def _identity(config: Config, inputs: Inputs, teachers: dict[str, str]) -> Identity:
    return identity_of(
        config,
        tokenizer=inputs.tokenizer_fingerprint,
        teachers=teachers,
        contexts=inputs.context_names,
        data=inputs.data_digest,
        pool=inputs.pool_digest,
    )


def write_skipped(
    folder: Path, line: Callable[[str], None], version: int, records: Sequence[Mapping[str, Any]]
) -> None:
    """Write what made the learner skip the step to `version` into `folder`, and warn with a progress `line`."""
    path = folder / f"step-{version:06d}.jsonl"
    folder.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    line(f"WARNING: step {version} was skipped, its gradient or loss is NaN or infinite; see {path}")


def check_exact(loss: LossConfig, vocab_size: int, teachers: Mapping[str, int]) -> None:
    """Raise ConfigError if ``loss.form`` is `exact` but ``loss.top_k`` is not the whole vocabulary of the student
    (`vocab_size`) and of every teacher (`teachers`, sizes by name).
    """
    if loss.form != "exact":
        return
    if loss.top_k != vocab_size:
        raise ConfigError(
            f"loss.form: `exact` is over the whole vocabulary of {vocab_size}, loss.top_k is {loss.top_k}; set "
            f"loss.top_k={vocab_size} (for small vocabularies), or loss.form=tail"
        )
    for name, size in teachers.items():
        if size != vocab_size:
            raise ConfigError(
                f"loss.form: `exact` needs one vocabulary: the student has {vocab_size} outputs, teacher {name!r} "
                f"{size}; set loss.form=tail"
            )


def check_longest(config: Config, memory_bytes: int, longest: int) -> str | None:
    """Return a warning if a rank with `memory_bytes` may be too small for a sequence of `longest` tokens, and raise
    ConfigError if it is. 0 bytes: unknown.
    """
    size = read_model_size(config.student.model) if memory_bytes else None
    fault = None if size is None else length_fault(config, size, memory_bytes - CUDA_BYTES, longest)
    if fault is None:
        return None
    if fault.certain:
        raise ConfigError(fault.text)
    return fault.text


async def user_facing_error(error: Exception, services: Services) -> Exception:
    """The error that a user should see: which rank of the learner died, if one did, else what was raised."""
    unwrapped = unwrap_ray_error(error)
    if isinstance(unwrapped, ServiceLost) or not isinstance(error, SyncError | ray.exceptions.RayError):
        return unwrapped
    try:
        await services.check_ranks()
    except ServiceLost as lost:
        return lost
    return unwrapped
