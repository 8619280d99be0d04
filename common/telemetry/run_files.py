"""What a run writes down while it goes: metrics, samples, spans of time, lines on the terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from common.telemetry.prometheus import PrometheusSink
from common.telemetry.sinks import Sink, TensorBoardSink

Span = tuple[float, float]
"""(start, end), seconds since the epoch."""


def covered_s(spans: Iterable[Span]) -> float:
    """Seconds during which at least one of `spans` was open: overlapping work counts once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write by rename, so a reader (or a crash) never meets half a file."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def lines_up_to(text: str, step: int) -> Iterator[str]:
    """JSON lines whose ``step`` is at most `step`; a last line that a crash cut short is left out."""
    for line in text.split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                yield line
        except json.JSONDecodeError:
            continue


@dataclass
class RunFiles:
    """The folder of one run: ``metrics.jsonl``, ``samples.jsonl``, ``audit.jsonl``, TensorBoard events; and `sinks`.

    Every line is flushed as it is written: what was done before a crash is kept.
    """

    folder: Path
    resume_after: int | None = None
    """Go on with the files of an earlier run: what it wrote of later steps is dropped, they are done again."""
    sinks: Sequence[Sink] = ()
    """Where numbers go besides; closed with the files."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._open("metrics.jsonl")
        self._samples = self._open("samples.jsonl")
        self._audit = self._open("audit.jsonl")
        self._tokens = self._open("tokens.jsonl")
        self._texts = self._open("texts.jsonl")
        purge = None if self.resume_after is None else self.resume_after + 1
        self._sinks = [TensorBoardSink(self.folder / "tensorboard", purge), *self.sinks]

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``; numbers go to the sinks too."""
        self._line(self._metrics, {"step": step, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.write(step, numbers)

    def relay_metrics(self, teacher: str, page: Callable[[], str]) -> None:
        """Show a teacher's own page of metrics in that of the run, where there is one (`PrometheusSink.relay`)."""
        for sink in self._sinks:
            if isinstance(sink, PrometheusSink):
                sink.relay(teacher, page)

    def sample(self, values: Mapping[str, Any]) -> None:
        """One line of ``samples.jsonl``."""
        self._line(self._samples, values)

    def tokens(self, values: Mapping[str, Any]) -> None:
        """One line of ``tokens.jsonl``: an answer token by token (`learner.trainer.token_records`)."""
        self._line(self._tokens, values)

    def text(self, values: Mapping[str, Any]) -> None:
        """One line of ``texts.jsonl``: a context or a held-out prompt that other files name. It belongs to no step."""
        self._line(self._texts, {"step": 0, **values})

    def audit(self, step: int, trained: Sequence[str], failed: Sequence[str], contexts: Sequence[str] = ()) -> None:
        """One line of ``audit.jsonl``: which samples the step was trained on, and which it had to do without; of a pool
        also the context of each that was trained on.
        """
        values = {"step": step, "trained": list(trained), "failed": list(failed)}
        self._line(self._audit, {**values, "contexts": list(contexts)} if contexts else values)

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
            kept = list(lines_up_to(path.read_text(encoding="utf-8"), self.resume_after))
        beside = path.with_name(name + ".partial")
        beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(beside, path)
        return path.open("a", encoding="utf-8")

    @staticmethod
    def _line(stream: Any, values: Mapping[str, Any]) -> None:
        stream.write(json.dumps(values, ensure_ascii=False) + "\n")
        stream.flush()


class Progress:
    """Lines for a log, and on a terminal one line that is rewritten while something long goes on."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stdout.isatty() and not quiet
        self._open = False

    def line(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        if not self._quiet:
            print(text, flush=True)

    def status(self, text: str) -> None:
        """What goes on right now; nothing where the output is not a terminal."""
        if self._terminal:
            width = os.get_terminal_size().columns - 1
            sys.stdout.write("\r\033[K" + text[:width])
            sys.stdout.flush()
            self._open = True

    def _clear(self) -> None:
        if self._open:
            sys.stdout.write("\r\033[K")
            self._open = False
