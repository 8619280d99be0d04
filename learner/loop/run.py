"""One run, from started services to its summary: start or resume, train, evaluate, keep what was done."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from common.async_utils import run_in_background
from common.config.model import Config, ConfigError, LossConfig
from common.data.rendering import check_lengths, teacher_sequence
from common.telemetry.run_files import Progress, RunFiles, write_json
from common.telemetry.trace import TraceFile
from common.weight_sync.collective import SyncError
from learner.cluster.services import Services
from learner.data.inputs import Inputs
from learner.data.teacher_answers import open_teacher_answers
from learner.errors import ServiceLost
from learner.evaluation.held_out import HeldOutEvaluator
from learner.evaluation.summary import Best, RunSummary, step_line, summary_json
from learner.loop.checkpoints import (
    LEARNER,
    CheckpointError,
    Checkpoints,
    Identity,
    Manifest,
    identity_of,
    refuse_other_run,
)
from learner.loop.kl_alarm import KlAlarm
from learner.loop.mismatch import MismatchGate, mismatch_bounds
from learner.loop.training_loop import StepOutcome, TrainingLoop
from learner.loop.user_errors import KNOWN_ERRORS, plain_error
from learner.trainer.token_records import ShownFiles

PLACEMENT_TIMEOUT_S = 600.0
"""How long a run that goes on waits for its GPUs: a lost node may have to be replaced first."""
BEST = "best.json"
"""In ``best/``: the step whose weights lie there, and its accuracy."""


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from; `accept_changes`: also where the run is no longer the one that wrote it."""

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
        self._controller: TrainingLoop | None = None
        self._teacher_answers = open_teacher_answers(config, inputs)
        self._alarm = KlAlarm(config.learner.kl_alarm_ratio)
        self._resumed = resumed
        self._checkpoints = Checkpoints(config.run.path / "checkpoints", config.checkpoint.keep)
        self._began = time.time()
        self.summary = RunSummary(planned_steps=config.learner.steps)
        self._held_out = HeldOutEvaluator(
            config, self._services, inputs, files, progress, self.summary, self._keep_workers
        )
        self._shown = ShownFiles(files, config.student.model, inputs.contexts)
        if resumed is None:
            self._shown.questions(inputs.eval)
        else:
            self.summary.restore(resumed.manifest.loop["summary"])
            self._forget_other_best()
            self._refuse_changes(resumed, resumed.manifest.identity.teachers)

    def _forget_other_best(self) -> None:
        """A run that was cut off after its checkpoint may have put later weights into ``best/``: then choose anew."""
        path, best = self._config.run.path / "best" / BEST, self.summary.best
        if best is not None and (not path.exists() or json.loads(path.read_text()) != asdict(best)):
            self._progress.line(f"WARNING: best/ does not hold the weights of step {best.step} any more; chosen anew")
            self.summary.best = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start, train, evaluate, save. Services are stopped and the summary is written on every way out.

        A cancelled run (Ctrl-C) keeps the weights of its last whole step.
        """
        try:
            await self._start()
            await self._train()
            await self._finish()
            self.summary.outcome = "finished"
        except asyncio.CancelledError:
            self.summary.outcome = "interrupted"
            await self._keep_interrupted()
            raise
        except (*KNOWN_ERRORS, ray.exceptions.RayError) as error:
            plain = await explained(error, self._services)
            self.summary.outcome = f"failed: {type(plain).__name__}: {plain}".splitlines()[0]
            raise plain from (None if isinstance(plain, KNOWN_ERRORS) else error)
        finally:
            self._progress.status("stopping")
            self.summary.add_seconds({"total": time.time() - self._began})
            write_json(self._config.run.path / "summary.json", summary_json(self.summary))
            if self._controller is not None:
                await self._controller.close()
            self._services.close()
            if self._teacher_answers is not None:
                self._teacher_answers.close()

    async def _start(self) -> None:
        config, services, started = self._config, self._services, time.time()
        local_teacher = config.teacher.model or (None if config.teacher.url else config.student.model)
        self._progress.status("reserving places")
        services.reserve(placement_timeout_s=PLACEMENT_TIMEOUT_S if self._resumed else 0.0)
        to_evaluate = self._resumed is None and bool(self._inputs.eval)
        to_answer = self._teacher_answers is not None and bool(self._teacher_answers.missing())
        if local_teacher not in (None, config.student.model) and (to_evaluate or to_answer):
            self._progress.line(f"starting {local_teacher}, which sees the context")
            await services.start_workers(str(local_teacher), None, config.rollout.workers if to_answer else 1)
            if to_evaluate:
                await self._held_out.in_context()
            await self._collect()
            services.close_workers()
        self._progress.line("starting the teacher and the learner")
        services.teachers.begin(services.placement)
        ranks = services.begin_ranks()
        scorer = await services.teachers.connect(
            self._inputs.contexts,
            tokenizer_fingerprint=self._inputs.tokenizer_fingerprint,
            longest_tokens=max(self._inputs.teacher_tokens().values()) + config.rollout.max_tokens,
        )
        for name, page in services.teachers.metrics_pages().items():
            self._files.relay_metrics(name, page)
        self._check_teacher_lengths()
        if self._resumed is not None:
            self._refuse_changes(self._resumed, services.teachers.fingerprints())
        self._progress.line("starting the rollout engines")
        await services.start_workers(config.student.model, scorer, config.rollout.workers)
        await services.wait_ranks(ranks)
        if config.teacher.kind == "base":
            await services.give_contexts(self._inputs.contexts)
        assert services.learner_info is not None
        check_exact(config.loss, services.learner_info.vocab_size, services.teachers.vocab_sizes())
        bounds = mismatch_bounds(
            config.sync, dtype=services.learner_info.dtype, max_staleness=config.rollout.max_staleness
        )
        self._drift = MismatchGate(bounds)
        await self._collect()  # by the student's initial weights, which are the teacher's, if nobody else has
        self._controller = TrainingLoop(
            config,
            services,
            self._inputs.train,
            self._progress.status,
            self._keep_skipped,
            self._inputs.context_sampler,
            self._teacher_answers,
        )
        parity = await self._controller.begin_parity()
        self.summary.parity_max_nats = max(self.summary.parity_max_nats, parity.max_nats)
        self.summary.add_seconds({"start": time.time() - started})
        self._progress.line(
            f"started in {time.time() - started:.0f} s; engine and learner agree to {parity.max_nats:.1e} nats"
        )
        services.invite_workers()
        if self._resumed is not None:
            await services.load_state(str((self._resumed.path / LEARNER).absolute()))
            await self._controller.begin(self.summary.steps, self._resumed.manifest.loop["position"])
            self._progress.line(
                f"resumed from {self._resumed.path}: {self.summary.steps} of {config.learner.steps} steps"
            )
            return
        await self._controller.begin(0)
        await self._held_out.before()
        if local_teacher == config.student.model:
            await self._held_out.in_context()
        self._held_out.warn_if_no_gap()

    async def _collect(self) -> None:
        """Have the engines as they are make those of the teacher's answers that are missing."""
        if self._teacher_answers is None or not self._teacher_answers.missing():
            return
        started, inputs, services = time.time(), self._inputs, self._services
        async with run_in_background(services.admit_replacements()):
            await self._teacher_answers.collect(
                lambda sample: teacher_sequence(sample.prompt, inputs.contexts), services.answer, self._progress.status
            )
        self.summary.add_seconds({"teacher answers": time.time() - started})
        self._progress.line(f"the teacher's answers are in {self._config.answers_path}")

    def _check_teacher_lengths(self) -> None:
        check_lengths(
            "teacher",
            self._inputs.teacher_tokens(),
            max_tokens=self._config.rollout.max_tokens,
            limit=self._services.teachers.longest_tokens or self._inputs.student_limit,
        )

    async def _train(self) -> None:
        controller = self._controller
        assert controller is not None
        for step in range(self.summary.steps, self._config.learner.steps):
            outcome = await controller.step(step)
            self._note(outcome)
            await self._validate(outcome.version)
            await self._keep(outcome.version)

    def _note(self, outcome: StepOutcome) -> None:
        summary = self.summary
        summary.steps = outcome.version
        summary.kl.append(outcome.metrics["kl/lower_bound"])
        summary.parity_max_nats = max(summary.parity_max_nats, outcome.parity.max_nats)
        summary.add_times(outcome.times)
        self._files.metrics(outcome.version, outcome.metrics)
        self._files.audit(outcome.version, outcome.trained, outcome.failed, outcome.contexts)
        self._shown.tokens(outcome.version, outcome.tokens)
        self._trace.write(outcome.spans)
        left_s = (summary.planned_steps - summary.steps) * summary.times.total_s / summary.steps
        self._progress.line(step_line(outcome.version, summary.planned_steps, outcome.metrics, left_s))
        for warning in (
            self._drift.check(outcome.version, outcome.metrics),
            self._alarm.observe(outcome.metrics["kl/lower_bound"]),
        ):
            if warning is not None:
                self._progress.line(f"WARNING: {warning}")

    def _keep_skipped(self, version: int, records: list[dict[str, Any]]) -> None:
        """What broke a step, for whoever looks for the reason."""
        path = self._config.run.path / "skipped" / f"step-{version:06d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        self._progress.line(f"WARNING: step {version} was skipped, its gradient or loss is NaN or infinite; see {path}")

    async def _validate(self, version: int) -> None:
        """Accuracy on ``data.valid``, which alone chooses ``best/``; a tie stays with the earlier step."""
        config, best = self._config, self.summary.best
        if not config.eval.every or (version % config.eval.every and version < config.learner.steps):
            return
        found = await self._held_out.accuracy("valid", version, self._inputs.valid)
        if found is not None and (best is None or found.accuracy > best.accuracy):
            folder = config.run.path / "best"
            await self._services.save(str(folder.absolute()))
            self.summary.best = Best(step=version, accuracy=found.accuracy)
            write_json(folder / BEST, asdict(self.summary.best))

    async def _keep(self, version: int) -> None:
        """The exports and the checkpoint that are due after step `version`."""
        settings, last = self._config.checkpoint, version == self._config.learner.steps
        if version in settings.export_at or (settings.export_every and version % settings.export_every == 0):
            await self._services.save(str((self._config.run.path / "exports" / f"step-{version:06d}").absolute()))
        if not settings.every or (version % settings.every and not last):
            return
        started = time.time()
        self._progress.status(f"step {version}: checkpoint")
        assert self._controller is not None
        manifest = Manifest(
            step=version,
            identity=self._identity(self._services.teachers.fingerprints()),
            loop={"summary": self.summary.state(), "position": self._controller.position()},
        )
        try:
            with self._checkpoints.writing(manifest) as folder:
                await self._services.save_state(str(folder.absolute()))
        except CheckpointError as error:
            await self._services.check_ranks()  # what the others say of one that died reads like a disk's error
            # Hours of training are not thrown away for a full disk: the last checkpoint is still there.
            self.summary.failed_checkpoints += 1
            self._progress.line(f"WARNING: {error}; going on without it")
        self.summary.add_seconds({"checkpoint": time.time() - started})

    def _identity(self, teachers: dict[str, str]) -> Identity:
        inputs = self._inputs
        return identity_of(
            self._config,
            tokenizer=inputs.tokenizer_fingerprint,
            teachers=teachers,
            contexts=tuple(inputs.contexts),
            data=inputs.data_digest,
            pool=inputs.pool_digest,
        )

    def _refuse_changes(self, resumed: Resumed, teachers: dict[str, str]) -> None:
        if not resumed.accept_changes:
            refuse_other_run(resumed.manifest, resumed.path, self._identity(teachers))

    async def _finish(self) -> None:
        await self._held_out.after(self.summary.steps)
        self._progress.status("saving")
        await self._services.save(str((self._config.run.path / "checkpoint").absolute()))

    async def _keep_interrupted(self) -> None:
        """The weights of the last whole step, where there was one. A second interrupt gives up on it."""
        steps, folder = self.summary.steps, self._config.run.path / "checkpoint"
        self._progress.line(f"interrupted after {steps} of {self._config.learner.steps} steps")
        if steps:
            self._progress.line(f"saving the weights of step {steps} to {folder}; interrupt again to leave without")
            await self._services.save(str(folder.absolute()))

    def _keep_workers(self, version: int) -> Coroutine[Any, Any, None]:
        """Beside an evaluation: lost workers are replaced, by ones that hold the weights that are evaluated."""
        if self._controller is None:
            return self._services.admit_replacements()
        return self._controller.keep_workers(version)


def check_exact(loss: LossConfig, vocab_size: int, teachers: Mapping[str, int]) -> None:
    """Raises ConfigError where ``loss.form`` is `exact` and ``loss.top_k`` is not the whole vocabulary: `vocab_size` of
    the student, and that of `teachers` by name.
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


async def explained(error: Exception, services: Services) -> Exception:
    """The error a user should see. Where a rank of the learner is dead it is that, whatever another rank said of it."""
    plain = plain_error(error)
    if isinstance(plain, ServiceLost) or not isinstance(error, SyncError | ray.exceptions.RayError):
        return plain
    try:
        await services.check_ranks()
    except ServiceLost as lost:
        return lost
    return plain
