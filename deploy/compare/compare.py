"""Runs the methods of a comparison one after another, each as an ordinary run in a separate process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config.loader import dump_config
from common.telemetry.run_files import Progress, write_json
from deploy.compare.picture import picture
from deploy.compare.plan import PlannedRun, can_resume, has_config, is_finished
from deploy.compare.table import Failed, Outcome, compared, markdown, read_outcome

STEP_LINE_S = 60.0
"""Time between two printed step lines of one run."""
Train = Callable[[PlannedRun, Path, Callable[[str], None]], None]
"""Executes one run until it finishes or fails, logs to the path, and passes each line to the callback."""


def compare(
    runs: Sequence[PlannedRun], methods: Sequence[str], root: Path, command: str, progress: Progress, train: Train
) -> Path:
    """Execute all unfinished runs; after each, write ``compare.json``, ``compare.md`` and ``compare.svg``.

    Returns the path of ``compare.md``. The picture needs at least one accuracy with an interval. A failed run becomes a
    line of the result, and the next run starts. An interrupt ends the comparison; results of finished runs stay.
    """
    root.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for number, run in enumerate(runs, start=1):
        outcomes.append(_outcome(run, f"[{number}/{len(runs)}] {run.name}", root, progress, train))
        result = compared([*outcomes, *(Failed(later, "not run yet") for later in runs[number:])], methods)
        write_json(root / "compare.json", result)
        (root / "compare.md").write_text(markdown(result, command), encoding="utf-8")
        if (svg := picture(result)) is not None:
            (root / "compare.svg").write_text(svg, encoding="utf-8")
    return root / "compare.md"


def _outcome(run: PlannedRun, label: str, root: Path, progress: Progress, train: Train) -> Outcome:
    if run.config is None:
        progress.line(f"{label}: not possible: {run.fault}")
        return Failed(run, run.fault or "")
    if is_finished(run):
        progress.line(f"{label}: already finished, {_result(read_outcome(run))}")
        return read_outcome(run)
    progress.line(f"{label}: {'resumes' if can_resume(run) else 'starts'}")
    (root / "logs").mkdir(exist_ok=True)
    started = time.time()
    train(run, root / "logs" / f"{run.name}.log", _Lines(label, progress))
    # The result of an earlier attempt must not count as this one's.
    found = read_outcome(run) if is_finished(run) else Failed(run, _reason(root / "logs" / f"{run.name}.log"))
    progress.line(f"{label}: {_result(found)} after {time.time() - started:.0f} s")
    return found


class _Lines:
    """Shows a run's lines: the newest in the status line, and a step's line once a minute for those who have none."""

    def __init__(self, label: str, progress: Progress) -> None:
        self._label = label
        self._progress = progress
        self._shown = time.monotonic()

    def __call__(self, text: str) -> None:
        self._progress.status(f"{self._label}: {text}")
        if text.startswith("step ") and time.monotonic() - self._shown >= STEP_LINE_S:
            self._progress.line(f"{self._label}: {text}")
            self._shown = time.monotonic()


def _result(outcome: Outcome) -> str:
    if isinstance(outcome, Failed):
        return f"FAILED: {outcome.reason}"
    return f"accuracy {outcome.summary['final']['accuracy']:.3f}"


def _reason(log: Path) -> str:
    """The last ``opcd: …`` line of a log, which states why the run ended, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("opcd: ") for line in lines if line.startswith("opcd: ")]
    return f"{(errors or lines or ['the log is empty'])[-1]} ({log})"


def train_in_process(run: PlannedRun, log: Path, on_line: Callable[[str], None], *, overwrite: bool = False) -> None:
    """Execute ``python -m learner.train`` on the run's configuration; `log` holds all its output.

    With `overwrite` it replaces a run of another configuration, which it otherwise refuses.
    An interrupt of the terminal also reaches the run; it is raised here after the run has ended.
    """
    assert run.config is not None
    file = log.with_suffix(".yaml")
    file.write_text(dump_config(run.config), encoding="utf-8")
    command = [sys.executable, "-m", "learner.train", str(file)]
    if can_resume(run):
        command.append("--resume")
    elif overwrite or has_config(run.config):  # an earlier attempt at the same run, without a checkpoint
        command.append("--overwrite")
    with (
        log.open("w", encoding="utf-8") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                on_line(line.strip())
        except KeyboardInterrupt:
            process.wait()
            raise
