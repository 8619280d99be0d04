"""Several teachers in one run: each row's answers go to the teacher that the row names."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from common.protocol.schema import ScoredTrajectory, Trajectory
from common.protocol.scoring import Scorer, ScorerFactory, ScoringError

DEFAULT_TEACHER = "default"
"""Scores the rows that name none: the `teacher` section of a configuration."""


@dataclass(frozen=True)
class RoutingScorerFactory:
    """Travels to a worker and makes a scorer of every teacher there."""

    factories: Mapping[str, ScorerFactory]

    def __call__(self) -> RoutingScorer:
        """A scorer of this process."""
        return RoutingScorer({name: factory() for name, factory in self.factories.items()})


class RoutingScorer:
    """Passes an answer to the scorer of its row's teacher."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self._scorers = scorers

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        """What the row's teacher says. Raises ScoringError where there is no teacher of that name."""
        name = trajectory.prompt.teacher or DEFAULT_TEACHER
        if name not in self._scorers:
            raise ScoringError(
                f"sample {trajectory.sample_id}: its row names teacher {name!r}, the run has "
                f"{', '.join(sorted(self._scorers))}"
            )
        return await self._scorers[name].score(trajectory)

    async def close(self) -> None:
        """Let go of all connections."""
        await asyncio.gather(*(scorer.close() for scorer in self._scorers.values()))
