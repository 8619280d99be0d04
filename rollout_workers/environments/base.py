"""The interface of an environment: one instance plays one episode at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class EpisodeError(RuntimeError):
    """An environment was stepped before its reset or after its end."""


@dataclass(frozen=True, slots=True)
class Step:
    """Result of one answer. When `done`, `observation` is the outcome in words; `reward` is for this step alone.

    `messages` are the turns before the next answer, with the fields of `common.data.rows.Message`, for example a tool's
    result ``({"role": "tool", "content": "84"},)``. Default: a user turn with `observation`.
    """

    observation: str
    reward: float
    done: bool
    messages: tuple[Mapping[str, Any], ...] = ()


@runtime_checkable
class Environment(Protocol):
    """Asynchronous, because many episodes share one event loop with an engine: slow work must await.

    An observation is the text of a user turn. The same seed and answers give the same observations and rewards. An
    environment may have an attribute `tools`, JSON schemas that the chat template describes in every prompt.
    """

    async def reset(self, seed: int) -> str:
        """Start the episode of `seed`; returns the first observation."""
        ...

    async def step(self, answer: str) -> Step:
        """Take the student's answer, without special tokens. Raises EpisodeError if no episode is in progress."""
        ...
