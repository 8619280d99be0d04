"""The interface of an environment: one instance plays one episode at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class EpisodeError(RuntimeError):
    """An environment that was used out of order: stepped before its reset, or after its end."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one answer led to. When `done`, `observation` is the outcome in words; `reward` is this step's alone."""

    observation: str
    reward: float
    done: bool


@runtime_checkable
class Environment(Protocol):
    """Asynchronous, because many episodes share one event loop with an engine: whatever takes long must await.

    An observation is text of a user turn. An equal seed and equal answers give equal observations and rewards.
    """

    async def reset(self, seed: int) -> str:
        """Begin the episode of `seed`; its first observation."""
        ...

    async def step(self, answer: str) -> Step:
        """Take the student's answer, special tokens left out. Raises EpisodeError when there is no episode."""
        ...
