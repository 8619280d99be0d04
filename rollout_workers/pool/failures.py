"""How it shows that a process is gone. Apart from the engine, whose module imports vLLM's world."""

from __future__ import annotations

import ray

ACTOR_LOST = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What every call of an actor raises whose process is gone. The second, which is none of the first, is of one that Ray
itself ended because its node ran out of memory."""
MOST_WORDS = 300
"""Characters of an error in one line: Ray's go on for pages."""


class EngineLost(RuntimeError):
    """The engine's processes are gone: nothing this worker does will succeed again."""


def short(error: BaseException) -> str:
    """What an error says, in one line; of a traceback that came over from an actor, its last line."""
    text = str(error)
    if isinstance(error, ray.exceptions.RayTaskError):
        text = text.rstrip().rpartition("\n")[2]
    return " ".join(text.split())[:MOST_WORDS] or type(error).__name__
