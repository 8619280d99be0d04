"""Runs each check in a separate process group: a crash, a hang or a full GPU ends that check only.

Imports the standard library only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from tests.gpu.report import Figure, Result

POLL_S = 0.05
LEAST_S = 5.0
"""A check does not begin with less time than this."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `function` is ``module:name`` of a generator of figures that takes a `Place`."""

    name: str
    function: str
    limit_s: float
    about: str
    needs: tuple[str, ...] = ()
    """Packages that must be installed in addition to torch."""
    gpus: int = 0
    """GPUs that the check needs; 0: it also runs on CPU."""


@dataclass(slots=True)
class Runner:
    """Settings of one check-up.

    `place` are the fields of `tests.gpu.place.Place`. Packages of `without` count as not installed. `together` runs
    all checks in one process, for small sizes, where importing torch is most of the time. `slower` multiplies the
    limit of every check.
    """

    place: Mapping[str, Any]
    gpus: int
    log: Path
    without: Sequence[str] = ()
    together: bool = False
    slower: float = 1.0
    report: Callable[[Result], None] = field(default=lambda result: None)

    def run(self, checks: Sequence[Check], limit_s: float) -> list[Result]:
        """Run `checks` in order; those that the limit of the whole check-up leaves no time for are skipped."""
        ends = time.monotonic() + limit_s
        results: list[Result] = []
        while len(results) < len(checks):
            waiting = checks[len(results) :]
            reason = self._obstacle(waiting[0])
            if reason is None and ends - time.monotonic() < min(LEAST_S, waiting[0].limit_s):
                reason = f"no time is left of the check-up's {limit_s:.0f} s"
            if reason is not None:
                done = [Result(waiting[0].name, "SKIP", reason=reason)]
            else:
                ready = list(takewhile(lambda check: self._obstacle(check) is None, waiting))
                done = self._run_process(ready if self.together else ready[:1], ends)
            for result in done:
                self.report(result)
            results += done
        return results

    def _obstacle(self, check: Check) -> str | None:
        missing = [name for name in check.needs if name in self.without or importlib.util.find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if check.gpus > self.gpus:
            return f"needs {check.gpus} GPU{'s' if check.gpus > 1 else ''}, this check-up has {self.gpus}"
        return None

    def _run_process(self, group: Sequence[Check], ends: float) -> list[Result]:
        """Run `group` in one process until it ends or a check exceeds its limit; returns the checks that began."""
        request = {
            "checks": [(check.name, check.function) for check in group],
            "place": dict(self.place),
            "without": list(self.without),
        }
        lines = self.log.with_name(f".{self.log.name}.{os.getpid()}.results")
        lines.write_text("")
        limits = {check.name: self.slower * check.limit_s for check in group}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.child", json.dumps(request), str(lines)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        progress = _Progress(lines, Result(group[0].name))
        try:
            while True:
                status = process.poll()
                progress.read()
                running, now = progress.running, time.monotonic()
                if running is not None:
                    seconds = now - progress.began
                    if status is not None:
                        progress.fail(f"the process {_ended(status)}: {_last_line(self.log)}", seconds)
                    elif now > min(progress.began + limits[running.check], ends):
                        progress.fail(f"not done after {seconds:.0f} s", seconds)
                if status is not None or progress.failed:
                    return progress.results
                time.sleep(POLL_S)
        finally:
            end_group(process)
            lines.unlink(missing_ok=True)


class _Progress:
    """Reads the lines that `tests.gpu.child` appends. `first` counts as running from the start of the process."""

    def __init__(self, path: Path, first: Result) -> None:
        self._path = path
        self._offset = 0
        self.results: list[Result] = [first]
        self.running: Result | None = first
        self.began = time.monotonic()
        self.failed = False

    def read(self) -> None:
        """Take in the complete lines since the last call."""
        with self._path.open() as stream:
            stream.seek(self._offset)
            text = stream.read()
        complete = text[: text.rfind("\n") + 1]
        self._offset += len(complete.encode())
        for line in complete.splitlines():
            self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if "begin" in line:
            if self.running is None:
                self.running = Result(line["begin"])
                self.results.append(self.running)
            return
        assert self.running is not None
        if "figure" in line:
            self.running.figures.append(Figure(**line["figure"]))
            return
        self.running.seconds = time.monotonic() - self.began
        if line["error"]:
            self.running.verdict, self.running.reason = "FAIL", line["error"]
        self.running.judge()
        self.running, self.began = None, time.monotonic()

    def fail(self, reason: str, seconds: float) -> None:
        """End the running check with FAIL."""
        assert self.running is not None
        self.running.verdict, self.running.reason, self.running.seconds = "FAIL", reason, seconds
        self.failed = True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and everything in its group that still runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "it wrote nothing"
