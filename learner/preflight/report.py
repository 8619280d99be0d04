"""Findings of the checks, and the report that collects them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from common.config.model import ConfigError
from learner.data.inputs import Inputs

Level = Literal["error", "warning", "summary"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. An `error` refuses the run; a `warning` does not; `summary` is a fact, with the `name` of its line."""

    level: Level
    text: str
    name: str = ""


def error(text: str) -> Finding:
    """A finding that refuses the run; `text` names the thing, the numbers and the remedy."""
    return Finding("error", text)


def warning(text: str) -> Finding:
    """A likely mistake with which a run can start."""
    return Finding("warning", text)


def summary(name: str, text: str) -> Finding:
    """A line of the dry run's summary."""
    return Finding("summary", text, name)


@dataclass
class Report:
    """All findings in order, and the rendered inputs; `inputs` is None if rows could not be rendered."""

    findings: list[Finding] = field(default_factory=list)
    inputs: Inputs | None = None

    def texts(self, level: Level) -> list[str]:
        """Texts of one level, each once, in order."""
        return list(dict.fromkeys(finding.text for finding in self.findings if finding.level == level))

    def summary_lines(self) -> Iterator[tuple[str, str]]:
        """Yield (name, text) of the summary."""
        yield from ((finding.name, finding.text) for finding in self.findings if finding.level == "summary")

    def raise_errors(self) -> None:
        """Raise ConfigError with a line for each error."""
        if errors := self.texts("error"):
            raise ConfigError("\n".join(errors))
