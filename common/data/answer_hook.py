"""The user's function of ``context.from_rollout``, which makes the context of one answer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from common.config.model import ConfigError

AnswerHook = Callable[[Mapping[str, Any], str, str], Awaitable[str | None]]
"""``async (row, prompt, response)`` -> text of the context, or None to leave the answer out of training.

`row` has the columns of the source, and those of the row by their own names. `prompt` is the last user turn, or the raw
prompt; `response` the answer without its end token and stop string.
"""


def load_answer_hook(spec: str) -> AnswerHook:
    """Import ``package.module:function``. Raises ConfigError unless it is an async function of three arguments."""
    module, colon, attribute = spec.partition(":")
    try:
        if not colon:
            raise ValueError("there is no colon")
        function: Any = importlib.import_module(module)
        for name in attribute.split("."):
            function = getattr(function, name)
        inspect.signature(function).bind("row", "prompt", "response")
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"bad value context.from_rollout={spec!r}: {error}; expected package.module:function of an "
            "`async def (row, prompt, response)`"
        ) from error
    if not inspect.iscoroutinefunction(function) and not inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  an object with an async __call__
    ):
        raise ConfigError(
            f"bad value context.from_rollout={spec!r}: not an `async def`; run slow work of a plain function by "
            "`await asyncio.to_thread(...)` inside one"
        )
    hook: AnswerHook = function
    return hook
