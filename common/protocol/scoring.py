"""What a rollout worker asks of a teacher, without knowing how it is reached."""

from __future__ import annotations

from typing import Protocol

from common.protocol.schema import ScoredTrajectory, Trajectory


class ScoringError(RuntimeError):
    """This one sample cannot be scored. It is counted and never trained on; the run goes on within its bound."""


class TeacherError(RuntimeError):
    """The teacher is lost, refuses the run, or is no longer the teacher the run began with: the run stops."""


class Scorer(Protocol):
    """Scores finished answers, many at once; raises ScoringError or TeacherError, never returns a partial score."""

    async def score(self, trajectory: Trajectory) -> ScoredTrajectory:
        """The teacher's log-probabilities for all response tokens of `trajectory`."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class ScorerFactory(Protocol):
    """Travels to a worker (so it pickles) and makes the scorer there."""

    def __call__(self) -> Scorer:
        """A scorer of this process."""
        ...
