"""Errors that mean a worker process died. Kept out of engine.py, which imports vLLM."""

from __future__ import annotations

import ray

from common.error_text import one_line

ACTOR_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""Errors that a call raises when the actor's process is gone. Ray raises OutOfMemoryError, which is no RayActorError,
for a process that Ray itself killed because its node ran out of memory."""


class EngineLost(RuntimeError):
    """The engine's processes are gone: no later call of this worker can succeed."""


def short(error: BaseException) -> str:
    """An error's text in one line; for a traceback from an actor, its last line."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return one_line(str(error).rstrip().rpartition("\n")[2])
    return one_line(error)
