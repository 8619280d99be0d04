"""Entry point of a run: ``python -m learner.train CONFIG [key=value ...]``, alone or under ``ray job submit``.

All cheap checks come before anything heavy starts. A run that ends early keeps its results and leaves no process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import ray

from common.async_utils import run_in_background
from common.config.loader import dump_config, load_config
from common.config.model import Config, ConfigError
from common.error_text import one_line
from common.garbage import skip_present_objects
from common.import_names import use_folder
from common.openmp import share_cores
from common.protocol.schema import Prompt
from common.serving import SERVER, server_arguments
from common.telemetry.environment import environment
from common.telemetry.library_messages import hide_expected_warnings
from common.telemetry.run_files import Progress, RunFiles, write_json
from common.telemetry.run_folder import check_free, check_start, clear, nothing_to_resume, owned
from common.telemetry.sinks import open_sinks
from common.telemetry.trace import TraceFile
from learner.cluster.services import Services
from learner.cluster.teachers import ask_remote_teachers
from learner.data.inputs import Inputs, read_inputs
from learner.errors import RunError, ServiceLost
from learner.evaluation.evaluate import evaluate_rows
from learner.evaluation.held_out import accuracy_line
from learner.evaluation.report_process import report_at_end
from learner.evaluation.summary import RunSummary, final_table
from learner.loop.checkpoints import CheckpointError, Checkpoints
from learner.loop.run import Resumed, Run, refuse_changes
from learner.loop.user_errors import KNOWN_ERRORS, known_error, unwrap_ray_error
from learner.preflight.checks import preflight

__all__ = ["KNOWN_ERRORS", "check_resume", "evaluate", "main", "run"]

INTERRUPTED = 130


def run(
    config: Config,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> int:
    """Run from start to end; returns the exit status. Raises one of `KNOWN_ERRORS`, whose text is all a user needs.

    `resume` starts from the newest checkpoint of ``run.dir/run.name``; `accept_changes` does so even if the model, the
    data or another part of the run has changed since. `overwrite` replaces an earlier run of the name. The folder
    belongs to this run until it ends. `verbose` prints more of each step.
    """
    hide_expected_warnings()
    check_free(config.run.path, resume=resume, overwrite=overwrite)
    with Progress(quiet=quiet, verbose=verbose) as progress, owned(config.run.path) as warning:
        if warning is not None:
            progress.line(f"WARNING: {warning}")
        replaced = check_start(config.run.path, resume=resume, overwrite=overwrite)
        if replaced is not None:
            progress.line(replaced)
        if resume and (finished := nothing_to_resume(config.run.path, config.learner.steps)) is not None:
            progress.line(finished)
            return 0
        return _run_owned(config, progress, resume=resume, accept_changes=accept_changes)


def _run_owned(config: Config, progress: Progress, *, resume: bool, accept_changes: bool) -> int:
    resumed = _find_checkpoint(config, accept_changes=accept_changes) if resume else None
    progress.status("checking models, data and this machine")
    report = preflight(config, every_row=False)
    for text in report.texts("warning"):
        progress.line(f"WARNING: {text}")
    report.raise_errors()
    inputs = report.inputs
    assert inputs is not None  # without an error, the rows are rendered
    if (checked := len(inputs.facts["data.train"])) < len(inputs.train):
        progress.line(
            f"checked {checked} of {len(inputs.train)} training rows, the longest among them; the others are checked "
            "when their turn comes (`opcd train --dry-run` checks all)"
        )
    if resumed is not None:
        refuse_changes(config, inputs, resumed, resumed.manifest.identity.teachers)
    teachers = config.named_teachers().values()
    if any(teacher.url is not None or teacher.backend == "remote" for teacher in teachers):
        progress.status("asking the teachers at teacher.url or teacher.endpoint")
        asyncio.run(ask_remote_teachers(config))
    if resumed is None:
        clear(config.run.path)
    with report_at_end(config.run.path, progress.line), cluster() as dashboard, interruptible():
        if dashboard is not None:
            progress.line(f"Ray's dashboard: {dashboard}")
        for restart in itertools.count(1):
            try:
                summary = _run_once(config, inputs, progress, resumed)
            except KeyboardInterrupt:
                return INTERRUPTED
            except ServiceLost as error:
                newest = Checkpoints(config.run.path / "checkpoints", config.checkpoint.keep).newest()
                if newest is None or restart > config.checkpoint.max_restarts:
                    raise
                resumed = Resumed(*newest, accept_changes)
                progress.line(f"{error}\nresuming from step {newest[1].step}, restart {restart}")
            else:
                break
    progress.line(final_table(summary))
    files = "report.html, summary.json, metrics.jsonl, samples.jsonl, trace.json, checkpoint/"
    progress.line(f"\nwritten to {config.run.path}/: {files}")
    gpu = config.rollout.gpus_per_worker > 0
    served = server_arguments(config.run.path / "checkpoint", config.run.name, gpu=gpu)
    progress.line(f"to serve it: opcd serve {config.run.path}\nor: {shlex.join(['python', '-m', SERVER, *served])}")
    return 0


def _run_once(config: Config, inputs: Inputs, progress: Progress, resumed: Resumed | None) -> RunSummary:
    """Run once, from the start or from `resumed`; ServiceLost ends it early."""
    after = None if resumed is None else resumed.manifest.step
    trace_bytes = None if resumed is None else resumed.manifest.loop["trace_bytes"]
    with (
        RunFiles(config.run.path, after, open_sinks(config, resume=after is not None)) as files,
        TraceFile(config.run.path / "trace.json", resume_at=trace_bytes) as trace,
    ):
        a_run = Run(config, inputs, files, trace, progress, resumed)
        (config.run.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        write_json(config.run.path / "environment.json", environment())
        with skip_present_objects():
            asyncio.run(a_run.run())
        return a_run.summary


def check_resume(config: Config, inputs: Inputs | None, *, accept_changes: bool) -> str:
    """A line about what ``--resume`` would do; starts nothing. Raises CheckpointError if it cannot be done.

    `inputs` is None if the rows could not be rendered here: then only the checkpoint itself is checked.
    """
    if (finished := nothing_to_resume(config.run.path, config.learner.steps)) is not None:
        return finished
    resumed = _find_checkpoint(config, accept_changes=accept_changes)
    if inputs is not None:
        refuse_changes(config, inputs, resumed, resumed.manifest.identity.teachers)
    return f"goes on from {resumed.path}, step {resumed.manifest.step} of {config.learner.steps}"


def _find_checkpoint(config: Config, *, accept_changes: bool) -> Resumed:
    """The checkpoint to resume. Raises CheckpointError if there is none."""
    newest = Checkpoints(config.run.path / "checkpoints", config.checkpoint.keep).newest()
    if newest is None:
        raise CheckpointError(
            f"--resume: no checkpoint under {config.run.path / 'checkpoints'}; checkpoint.every sets how often one is "
            "written"
        )
    return Resumed(*newest, accept_changes)


def evaluate(config: Config, checkpoint: Path | None = None) -> int:
    """Measure held-out accuracy of `checkpoint` (default: the initial student) without and with the context."""
    if config.data.eval is None:
        raise ConfigError("data.eval is not set: there is nothing to evaluate on")
    progress = Progress()
    inputs = read_inputs(config)
    model = str(checkpoint or config.student.model)

    async def both(files: RunFiles) -> None:
        services = Services(config)
        try:
            progress.status(f"starting {model}")
            if (warning := services.reserve(workers_only=True)) is not None:
                progress.line(f"WARNING: {warning}")
            await services.start_workers(model, None, config.rollout.workers)
            sets: list[tuple[str, Sequence[Prompt], bool]] = [("without context", inputs.eval, False)]
            sets += [("with context", inputs.eval, True)] if inputs.has_context_for_eval else []
            sets += [(f"ood/{name}", rows, False) for name, rows in inputs.ood.items()]
            for name, rows, with_context in sets:
                async with run_in_background(services.admit_replacements()):
                    result = await evaluate_rows(services, config, inputs, rows, name, 0, files, with_context)
                progress.line(accuracy_line(name, result))
        finally:
            services.close()

    folder = config.run.path / "evaluate"
    with owned(folder), RunFiles(folder) as files, cluster(), interruptible():
        try:
            asyncio.run(both(files))
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            raise known_error(unwrap_ray_error(error), folder) from error
    return 0


@contextmanager
def cluster() -> Iterator[str | None]:
    """Connect to Ray: to the cluster of ``RAY_ADDRESS`` (as in a submitted job), else start a local one.

    Yields the address of Ray's dashboard, or None.
    """
    if ray.is_initialized():
        yield _dashboard()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = "RAY_ADDRESS" not in os.environ
    if local:
        share_cores(os.environ)  # actors inherit it
    # Without an address Ray would join any cluster that runs on this machine, even another user's.
    address, dashboard = ("local", False) if local else (None, None)
    try:
        ray.init(address, log_to_driver=False, logging_level="WARNING", include_dashboard=dashboard)
    except Exception as error:  # of grpc, of the operating system and of Ray itself
        where = "here" if local else f"at {os.environ['RAY_ADDRESS']} (RAY_ADDRESS)"
        raise RunError(f"Ray does not start or answer {where}: {one_line(error)}") from error
    try:
        yield _dashboard()
    finally:
        ray.shutdown()


def _dashboard() -> str | None:
    address = ray._private.worker.get_dashboard_url()
    return f"http://{address}" if address else None


@contextmanager
def interruptible() -> Iterator[None]:
    """Handle SIGTERM (``ray job stop``, a scheduler) like Ctrl-C: the run shuts down in order.

    Also if SIGINT is ignored, as in what a script starts in the background. Enter it within `cluster`: ``ray.init``
    replaces the handler by its own, which aborts the process after three seconds.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, interrupt)
    if before[signal.SIGINT] is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m learner.train CONFIG [key=value ...] [--resume] [--accept-changes] [--overwrite] [--verbose]``."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.train", description="Run a distillation from start to end."
    )
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides such as learner.lr=1e-5")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume although model, teacher, data, context or loss changed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run of the same name")
    parser.add_argument("--verbose", action="store_true", help="print times, queues and parity of each step")
    words = parser.parse_intermixed_args(arguments)
    try:
        use_folder(Path.cwd())
        return run(
            load_config(words.config, words.overrides),
            resume=words.resume,
            accept_changes=words.accept_changes,
            overwrite=words.overwrite,
            verbose=words.verbose,
        )
    except KNOWN_ERRORS as error:
        print(f"opcd: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
