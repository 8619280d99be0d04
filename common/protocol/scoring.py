"""Interface from rollout workers to teachers, and the routing of rows to several teachers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.protocol.schema import ScoredTrajectory, Trajectory

DEFAULT_TEACHER = "default"
"""Name of the `teacher` section, which scores rows without a teacher's name."""


class ScoringError(RuntimeError):
    """One sample cannot be scored. It is counted and not trained on; the run continues within its bound."""


class TeacherError(RuntimeError):
    """The teacher is lost, refuses the run, or is not the teacher that the run started with. The run stops."""


class Scorer(Protocol):
    """Scores finished responses concurrently. Raises ScoringError or TeacherError; a score is never partial."""

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        """Return the teacher's log-probs for all response tokens of `trajectory`."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class ScorerFactory(Protocol):
    """Picklable factory: a worker receives it and makes its own scorer."""

    def __call__(self) -> Scorer:
        """Make a scorer for this process."""
        ...


@dataclass(frozen=True)
class RoutingScorerFactory:
    """Makes a `RoutingScorer` over the scorers of several teachers."""

    factories: Mapping[str, ScorerFactory]

    def __call__(self) -> RoutingScorer:
        """Make a scorer for this process."""
        return RoutingScorer({name: factory() for name, factory in self.factories.items()})


class RoutingScorer:
    """Passes a response to the scorer of its row's teacher."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self._scorers = scorers

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        """Return the score by the row's teacher. Raises ScoringError for an unknown teacher."""
        name = trajectory.prompt.teacher or DEFAULT_TEACHER
        if name not in self._scorers:
            raise ScoringError(
                f"sample {trajectory.sample_id}: its row names teacher {name!r}, the run has "
                f"{', '.join(sorted(self._scorers))}"
            )
        return await self._scorers[name].score(trajectory)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(scorer.close() for scorer in self._scorers.values()))
