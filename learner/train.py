"""Entry of a run: ``python -m learner.train CONFIG [key=value ...]``, under ``ray job submit`` or alone.

Everything cheap is checked before anything heavy starts. Whatever happens afterwards, what was done is kept and no
process is left behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray

from common.chat import check_lengths, teacher_sequence
from common.collective import SyncError
from common.config import Config, ConfigError
from common.config_file import dump_config, load_config
from common.data import DataError
from common.evaluation import Accuracy, accuracy, grade
from common.schema import Prompt, Sampling
from common.scoring import TeacherError
from common.telemetry import Progress, RunFiles, write_json
from learner.controller import Controller, RunError
from learner.inputs import Inputs, read_inputs
from learner.parity import ParityError
from learner.services import Services
from learner.summary import Tally, final_table, step_line, summary_of

KNOWN_ERRORS = (ConfigError, DataError, RunError, ParityError, SyncError, TeacherError)
"""Errors whose text is all a user needs; anything else shows its trace."""

INTERRUPTED = 130


class Run:
    """One run, from started services to its summary."""

    def __init__(self, config: Config, inputs: Inputs, files: RunFiles, progress: Progress) -> None:
        self._config = config
        self._inputs = inputs
        self._files = files
        self._progress = progress
        self._services = Services(config)
        self._began = time.time()
        self.tally = Tally(planned_steps=config.learner.steps)

    # --- life -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start, train, evaluate, save. Services are stopped and the summary is written on every way out."""
        try:
            self._start()
            self._train()
            self._finish()
            self.tally.outcome = "finished"
        except KeyboardInterrupt:
            self.tally.outcome = "interrupted"
            self._keep_interrupted()
            raise
        except (*KNOWN_ERRORS, ray.exceptions.RayError) as error:
            plain = plain_error(error)
            self.tally.outcome = f"failed: {type(plain).__name__}: {plain}".splitlines()[0]
            raise plain from (None if isinstance(plain, KNOWN_ERRORS) else error)
        finally:
            self._progress.status("stopping")
            self.tally.seconds["total"] = time.time() - self._began
            write_json(self._config.run.path / "summary.json", summary_of(self.tally))
            self._services.close()

    def _start(self) -> None:
        config, services, started = self._config, self._services, time.time()
        local_teacher = config.teacher.model or (None if config.teacher.url else config.student.model)
        if self._inputs.eval and local_teacher not in (None, config.student.model):
            self._progress.line(f"evaluating {local_teacher} in context")
            services.begin_workers(str(local_teacher), None, 1)
            services.wait_workers()
            self.tally.in_context = self._evaluate("in_context", 0, self._inputs.eval, with_context=True)
            services.close_workers()
        self._progress.line("starting the teacher and the learner")
        teacher = services.begin_teacher()
        ranks = services.begin_ranks()
        scorer = services.connect_teacher(
            teacher,
            self._inputs.contexts,
            tokenizer_fingerprint=self._inputs.tokenizer_fingerprint,
            longest_tokens=max(self._inputs.teacher_tokens().values()) + config.rollout.max_tokens,
        )
        self._check_teacher_lengths()
        self._progress.line("starting the rollout engines")
        services.begin_workers(config.student.model, scorer, config.rollout.workers)
        services.wait_workers()
        services.wait_ranks(ranks)
        services.open_sync()
        self._controller = Controller(config, services, self._inputs.train, self._progress.status)
        parity = self._controller.begin_parity()
        self.tally.parity_max_nats = parity.max_nats
        self.tally.add_seconds({"start": time.time() - started})
        self._progress.line(
            f"started in {time.time() - started:.0f} s; engine and learner agree to {parity.max_nats:.1e} nats"
        )
        self.tally.base = self._evaluate("base", 0, self._inputs.eval)
        if local_teacher == config.student.model:
            self.tally.in_context = self._evaluate("in_context", 0, self._inputs.eval, with_context=True)

    def _check_teacher_lengths(self) -> None:
        info = self._services.teacher_info
        assert info is not None
        check_lengths(
            "teacher",
            self._inputs.teacher_tokens(),
            max_tokens=self._config.rollout.max_tokens,
            limit=info.max_sequence_tokens,
        )

    def _train(self) -> None:
        config, tally = self._config, self.tally
        for step in range(config.learner.steps):
            outcome = self._controller.step(step)
            tally.steps = outcome.version
            tally.kl.append(outcome.metrics["kl/full_bound"])
            tally.parity_max_nats = max(tally.parity_max_nats, outcome.parity.max_nats)
            tally.add_seconds({stage: value for stage, value in outcome.seconds.items() if stage != "total"})
            self._files.metrics(outcome.version, outcome.metrics)
            self._progress.line(step_line(outcome.version, config.learner.steps, outcome.metrics))
            if (
                config.eval.every
                and outcome.version % config.eval.every == 0
                and outcome.version < config.learner.steps
            ):
                self._evaluate("valid", outcome.version, self._inputs.valid or self._inputs.eval)

    def _finish(self) -> None:
        self.tally.final = self._evaluate("final", self.tally.steps, self._inputs.eval)
        self._progress.status("saving")
        self._services.save(str((self._config.run.path / "checkpoint").absolute()))

    def _keep_interrupted(self) -> None:
        """The weights of the last whole step, where there was one. A second interrupt gives up on it."""
        steps, folder = self.tally.steps, self._config.run.path / "checkpoint"
        self._progress.line(f"interrupted after {steps} of {self._config.learner.steps} steps")
        if steps:
            self._progress.line(f"saving the weights of step {steps} to {folder}; interrupt again to leave without")
            self._services.save(str(folder.absolute()))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, name: str, step: int, rows: Sequence[Prompt], *, with_context: bool = False) -> Accuracy | None:
        """Greedy accuracy of the engines' current weights on `rows`; every answer goes to ``samples.jsonl``."""
        if not rows:
            return None
        started = time.time()
        self._progress.status(f"evaluating: {name}, {len(rows)} rows")
        result = evaluate_rows(self._services, self._config, self._inputs, rows, name, step, self._files, with_context)
        self.tally.add_seconds({"evaluation": time.time() - started})
        low, high = result.ci95
        self._files.metrics(step, {f"accuracy/{name}": result.accuracy})
        self._progress.line(f"accuracy {name:<11} {result.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {result.n})")
        return result


def plain_error(error: Exception) -> Exception:
    """The error a user should see: what an actor raised instead of Ray's wrapping of it, or which actor died."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, KNOWN_ERRORS):
        return error.cause
    if isinstance(error, ray.exceptions.RayActorError):
        node = ray._private.worker.global_worker.node
        logs = f"; its log is under {node.get_logs_dir_path()}" if node else ""
        return RunError(f"an actor of the run died: {' '.join(str(error).split())}{logs}")
    return error


def evaluate_rows(
    services: Services,
    config: Config,
    inputs: Inputs,
    rows: Sequence[Prompt],
    name: str,
    step: int,
    files: RunFiles,
    with_context: bool,
) -> Accuracy:
    """Generate greedily, grade, write every answer down."""
    sampling = Sampling(
        max_tokens=config.eval.max_tokens or config.rollout.max_tokens, temperature=0.0, stop=config.rollout.stop
    )
    sequences = [teacher_sequence(row, inputs.contexts) if with_context else row.student_ids.tolist() for row in rows]
    answers = services.generate(sequences, sampling)
    expected = [str(row.answer) for row in rows]
    right = grade([answer.text for answer in answers], expected, inputs.grader)
    for row, answer, verdict in zip(rows, answers, right, strict=True):
        files.sample(
            {
                "set": name,
                "step": step,
                "id": row.row_id,
                "answer": answer.text,
                "expected": row.answer,
                "right": verdict,
                "finish_reason": answer.finish_reason,
            }
        )
    return accuracy(right)


def run(config: Config, *, quiet: bool = False) -> int:
    """One whole run; returns the exit status. Raises one of `KNOWN_ERRORS` with what a user needs to know."""
    progress = Progress(quiet=quiet)
    progress.status("reading data")
    inputs = read_inputs(config)
    with interruptible(), RunFiles(config.run.path) as files, cluster():
        (config.run.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        one = Run(config, inputs, files, progress)
        try:
            one.run()
        except KeyboardInterrupt:
            return INTERRUPTED
        progress.line(final_table(one.tally))
        progress.line(f"\nwritten to {config.run.path}/: summary.json, metrics.jsonl, samples.jsonl, checkpoint/")
    return 0


def evaluate(config: Config, checkpoint: Path | None = None) -> int:
    """Held-out accuracy of `checkpoint` (default: the student's initial model), without context and with it."""
    if config.data.eval is None:
        raise ConfigError("data.eval is not set: there is nothing to evaluate on")
    progress = Progress()
    inputs = read_inputs(config)
    model = str(checkpoint or config.student.model)
    with interruptible(), RunFiles(config.run.path / "evaluate") as files, cluster():
        services = Services(config)
        try:
            progress.status(f"starting {model}")
            services.begin_workers(model, None, config.rollout.workers)
            services.wait_workers()
            for name, with_context in (("without context", False), ("with context", True)):
                result = evaluate_rows(services, config, inputs, inputs.eval, name, 0, files, with_context)
                low, high = result.ci95
                progress.line(f"{name:<16} {result.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {result.n})")
        finally:
            services.close()
    return 0


@contextmanager
def cluster() -> Iterator[None]:
    """Ray: the cluster this process belongs to (``RAY_ADDRESS``, a submitted job), else one of its own."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = "RAY_ADDRESS" not in os.environ
    ray.init(log_to_driver=False, logging_level="WARNING", include_dashboard=False if own else None)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM (``ray job stop``, a scheduler) ends a run like Ctrl-C: in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m learner.train CONFIG [key=value ...]``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0].startswith("-"):
        print("usage: python -m learner.train CONFIG [key=value ...]", file=sys.stderr)
        return 2
    try:
        return run(load_config(words[0], words[1:]))
    except KNOWN_ERRORS as error:
        print(f"opcd: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
