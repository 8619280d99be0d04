"""Files and terminal lines that a run writes: metrics, samples, tokens, texts, audit."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from common.telemetry.prometheus import PrometheusSink
from common.telemetry.sinks import MlflowSink, Sink, TensorBoardSink, WandbSink

TABLE_ROWS = 64
"""Held-out answers of an evaluation that trackers show as a table; ``samples.jsonl`` has all."""


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file by rename: a reader, or a crash, never sees half a file."""
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _lines_up_to(text: str, step: int) -> Iterator[str]:
    """Yield JSON lines whose ``step`` is at most `step`; a last line cut by a crash is dropped."""
    for line in text.split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except json.JSONDecodeError:
            continue


@dataclass
class RunFiles:
    """Folder of one run: ``{metrics,samples,audit,tokens,texts}.jsonl``, TensorBoard events; and `sinks`.

    Every line is flushed when written, so a crash loses none.
    """

    folder: Path
    resume_after: int | None = None
    """Continue the files of an earlier run after this step; lines of later steps are dropped."""
    sinks: Sequence[Sink] = ()
    """Further receivers of metrics; closed with the files."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._open("metrics.jsonl")
        self._samples = self._open("samples.jsonl")
        self._audit = self._open("audit.jsonl")
        self._tokens = self._open("tokens.jsonl")
        self._texts = self._open("texts.jsonl")
        self._table: list[Mapping[str, Any]] = []
        purge = None if self.resume_after is None else self.resume_after + 1
        self._sinks = [TensorBoardSink(self.folder / "tensorboard", purge), *self.sinks]

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of ``metrics.jsonl`` and send its numbers to the sinks."""
        self._line(self._metrics, {"step": step, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.write(step, numbers)

    def relay_metrics(self, teacher: str, page: Callable[[], str]) -> None:
        """Add a teacher's metrics page to the run's, if the run serves one (`PrometheusSink.relay`)."""
        for sink in self._sinks:
            if isinstance(sink, PrometheusSink):
                sink.relay(teacher, page)

    def sample(self, values: Mapping[str, Any]) -> None:
        """Write a line of ``samples.jsonl``."""
        self._line(self._samples, values)
        if len(self._table) < TABLE_ROWS:
            self._table.append(values)

    def end_of_samples(self, step: int, name: str) -> None:
        """Send the first `TABLE_ROWS` samples since the last call to the sinks that show tables."""
        rows, self._table = self._table, []
        for sink in self._sinks:
            if rows and isinstance(sink, WandbSink | MlflowSink):
                sink.table(step, name, rows)

    def tokens(self, values: Mapping[str, Any]) -> None:
        """Write a line of ``tokens.jsonl``: an answer token by token (`learner.trainer.token_records`)."""
        self._line(self._tokens, values)

    def text(self, values: Mapping[str, Any]) -> None:
        """Write a line of ``texts.jsonl``: a context or a held-out prompt that other files name, for all steps."""
        self._line(self._texts, {"step": 0, **values})

    def audit(
        self,
        step: int,
        trained: Sequence[str],
        failed: Sequence[str],
        contexts: Sequence[str] = (),
        dropped: Sequence[str] = (),
    ) -> None:
        """Write a line of ``audit.jsonl``: the samples that the step trained on and those that failed.

        `contexts`: with several contexts, that of each trained sample. `dropped`: samples that
        ``context.from_rollout`` left out.
        """
        values = {"step": step, "trained": list(trained), "failed": list(failed)}
        more = {"contexts": list(contexts), "dropped": list(dropped)}
        self._line(self._audit, values | {name: ids for name, ids in more.items() if ids})

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._metrics, self._samples, self._audit, self._tokens, self._texts):
            stream.close()
        for sink in self._sinks:
            sink.close()

    def _open(self, name: str) -> Any:
        path = self.folder / name
        kept: list[str] = []
        if self.resume_after is not None and path.exists():
            kept = list(_lines_up_to(path.read_text(encoding="utf-8"), self.resume_after))
        _replace(path, "".join(line + "\n" for line in kept))
        return path.open("a", encoding="utf-8")

    @staticmethod
    def _line(stream: Any, values: Mapping[str, Any]) -> None:
        stream.write(json.dumps(values, ensure_ascii=False) + "\n")
        stream.flush()


class Progress:
    """Log lines, and on a terminal one status line that is rewritten during long operations.

    Use it as a context manager, so that no status text stays before what others print.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self.verbose = verbose
        """True if the user asked for details."""
        self._terminal = sys.stdout.isatty() and not quiet
        self._open = False

    def line(self, text: str) -> None:
        """Print a line."""
        self.clear()
        if not self._quiet:
            print(text, flush=True)

    def status(self, text: str) -> None:
        """Replace the status line; does nothing if the output is not a terminal."""
        if self._terminal:
            width = os.get_terminal_size().columns - 1
            sys.stdout.write("\r\033[K" + text[:width])
            sys.stdout.flush()
            self._open = True

    def clear(self) -> None:
        """Remove the status line."""
        if self._open:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()
            self._open = False

    async def waiting(self, text: str) -> None:
        """Show `text` and the seconds since now in the status line, until cancelled."""
        began = time.monotonic()
        while True:
            self.status(f"{text}, {time.monotonic() - began:.0f} s")
            await asyncio.sleep(1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
