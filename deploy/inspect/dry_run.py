"""The dry run's output: the summary of `learner.preflight`."""

from __future__ import annotations

from collections.abc import Iterator

from learner.preflight.report import Report


def summary_text(report: Report) -> Iterator[str]:
    """Yield a line for each fact of the run that would start."""
    facts = list(report.summary_lines())
    width = max((len(name) for name, _ in facts), default=0)
    yield from (f"{name:<{width}}  {text}" for name, text in facts)
