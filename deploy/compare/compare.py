"""Runs the methods of a comparison one after the other, each as an ordinary run in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.config.loader import dump_config
from common.telemetry.run_files import Progress, write_json
from deploy.compare.picture import picture
from deploy.compare.plan import PlannedRun, can_resume, is_finished
from deploy.compare.table import Failed, Outcome, compared, markdown, read

Train = Callable[[PlannedRun, Path, Callable[[str], None]], None]
"""Does one run to its end, whatever that is; its lines go to the callback."""


def compare(
    runs: Sequence[PlannedRun], methods: Sequence[str], root: Path, command: str, progress: Progress, train: Train
) -> Path:
    """Run what is not finished; after every run write ``compare.json``, ``compare.md`` and ``compare.svg`` anew.

    Returns the path of the second; the third is there once there is something to draw.

    A run that fails is a line of the result; the others go on. An interrupt ends all, and what is finished stays.
    """
    root.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for place, run in enumerate(runs, start=1):
        outcomes.append(_outcome(run, f"[{place}/{len(runs)}] {run.name}", root, progress, train))
        result = compared([*outcomes, *(Failed(later, "not run yet") for later in runs[place:])], methods)
        write_json(root / "compare.json", result)
        (root / "compare.md").write_text(markdown(result, command), encoding="utf-8")
        if (drawn := picture(result)) is not None:
            (root / "compare.svg").write_text(drawn, encoding="utf-8")
    return root / "compare.md"


def _outcome(run: PlannedRun, label: str, root: Path, progress: Progress, train: Train) -> Outcome:
    if run.config is None:
        progress.line(f"{label}: cannot be run: {run.fault}")
        return Failed(run, run.fault or "")
    if is_finished(run):
        progress.line(f"{label}: finished already, {_result(read(run))}")
        return read(run)
    progress.line(f"{label}: {'goes on' if can_resume(run) else 'starts'}")
    (root / "logs").mkdir(exist_ok=True)
    started = time.time()
    train(run, root / "logs" / f"{run.name}.log", lambda text: progress.status(f"{label}: {text}"))
    # What an earlier try left must not pass for the result of this one.
    found = read(run) if is_finished(run) else Failed(run, _why(root / "logs" / f"{run.name}.log"))
    progress.line(f"{label}: {_result(found)} after {time.time() - started:.0f} s")
    return found


def _result(outcome: Outcome) -> str:
    if isinstance(outcome, Failed):
        return f"FAILED: {outcome.why}"
    return f"accuracy {outcome.summary['final']['accuracy']:.3f}"


def _why(log: Path) -> str:
    """The line in which a run says why it ended, else its last one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("opcd: ") for line in lines if line.startswith("opcd: ")]
    return f"{(said or lines or ['it said nothing'])[-1]} ({log})"


def train_apart(run: PlannedRun, log: Path, hear: Callable[[str], None]) -> None:
    """``python -m learner.train`` on the run's configuration; everything it prints is in `log`.

    An interrupt of the terminal reaches the run too, and is raised here once it has ended in order.
    """
    assert run.config is not None
    file = log.with_suffix(".yaml")
    file.write_text(dump_config(run.config), encoding="utf-8")
    command = [sys.executable, "-m", "learner.train", str(file), *(["--resume"] if can_resume(run) else [])]
    with (
        log.open("w", encoding="utf-8") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                hear(line.strip())
        except KeyboardInterrupt:
            process.wait()
            raise
