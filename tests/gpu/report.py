"""Figures, verdicts, and their forms: a line a check, a Markdown table, JSON. Imports the standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["OK", "FAIL", "SKIP"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. `value` None means that this device cannot measure it; without a limit it only informs."""

    name: str
    value: float | None
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def judged(self) -> bool:
        """True if the figure is measured and has a limit."""
        return self.value is not None and (self.at_most is not None or self.at_least is not None)

    @property
    def ok(self) -> bool:
        """True unless a limit is broken; a NaN breaks every limit."""
        if self.value is None:
            return True
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name} not measured"
        limits = [f"≤ {_number(self.at_most)}"] if self.at_most is not None else []
        limits += [f"≥ {_number(self.at_least)}"] if self.at_least is not None else []
        text = " ".join([self.name, _number(self.value), *([self.unit] if self.unit else [])])
        return f"{text} ({', '.join(limits)})" if limits else text


@dataclass(slots=True)
class Result:
    """Outcome of one check. `reason` says why it failed or was skipped, in one line."""

    check: str
    verdict: Verdict = "OK"
    figures: list[Figure] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    def judge(self) -> None:
        """Turn OK into FAIL for a broken limit, or if no figure could be judged."""
        broken = [figure.name for figure in self.figures if not figure.ok]
        if self.verdict != "OK":
            return
        if broken:
            self.verdict, self.reason = "FAIL", f"beyond the limit: {', '.join(broken)}"
        elif not any(figure.judged for figure in self.figures):
            self.verdict, self.reason = "FAIL", "the check gave no figure with a limit"

    def line(self) -> str:
        """One line: verdict, name, reason, figures, seconds."""
        parts = [self.reason] if self.reason else []
        parts += [str(figure) for figure in self.figures]
        seconds = "" if self.verdict == "SKIP" else f"  [{self.seconds:.1f} s]"
        return f"{self.verdict:<4} {self.check:<10} {' · '.join(parts)}{seconds}"


def summary(results: Sequence[Result]) -> str:
    """Count the verdicts: ``9 OK, 1 FAIL (head), 3 SKIP``."""
    counts = []
    for verdict in ("OK", "FAIL", "SKIP"):
        names = [result.check for result in results if result.verdict == verdict]
        if names:
            counts.append(f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if verdict == "FAIL" else ""))
    return ", ".join(counts)


def markdown(results: Sequence[Result], machine: Mapping[str, str]) -> str:
    """A table for docs/gpu-checklist.md, below a line that names the machine."""
    lines = [", ".join(f"{name}: {value}" for name, value in machine.items()), ""]
    lines += ["| check | verdict | figures (limits) | s |", "|---|---|---|---|"]
    for result in results:
        parts = [result.reason] if result.reason else []
        cells = " · ".join([*parts, *map(str, result.figures)]).replace("|", "\\|")
        lines.append(f"| {result.check} | {result.verdict} | {cells} | {result.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def as_json(results: Sequence[Result], machine: Mapping[str, str]) -> dict[str, Any]:
    """Everything, as plain values."""
    return {"machine": dict(machine), "results": [asdict(result) for result in results]}


def _number(value: float) -> str:
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.2e}"
