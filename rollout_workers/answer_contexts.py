"""Contexts made from answers (``context.from_rollout``): calls the user's function and renders its text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common.config.model import ContextConfig
from common.data.answer_hook import load_answer_hook
from common.data.rendering import Renderer
from common.data.rows import DataError, Row
from common.error_text import one_line
from common.protocol.schema import Trajectory


class AnswerContextError(RuntimeError):
    """The function failed for one answer, or its text cannot be rendered. One line."""


class AnswerContexts:
    """Gives each answer of a rollout worker the context that the user's function makes of it."""

    def __init__(self, settings: ContextConfig, renderer: Renderer) -> None:
        """Raises ConfigError if the function cannot be imported."""
        assert settings.from_rollout is not None
        self._name = settings.from_rollout
        self._hook = load_answer_hook(settings.from_rollout)
        self._timeout_s = settings.call_timeout_s
        self._slots = asyncio.Semaphore(settings.max_concurrent_calls)
        self._renderer = renderer

    async def apply(self, trajectory: Trajectory, response: str) -> Trajectory | None:
        """Return `trajectory` with the context for its answer, whose text is `response`; None to leave it out.

        Raises AnswerContextError if the function raises, takes too long or returns no text, and for a text that the
        chat template cannot render.
        """
        columns = trajectory.prompt.row
        assert columns is not None
        text = await self._call(columns, response)
        if text is None:
            return None
        form = {name: columns[name] for name in ("prompt", "messages", "tools") if columns.get(name) is not None}
        row = Row(id=trajectory.prompt.row_id, context=text, **form)
        try:
            self._renderer.share_parents([row], at_least=1)
            prompt = self._renderer.render(row)
        except DataError as error:
            raise AnswerContextError(f"context.from_rollout: {one_line(error)}") from error
        return replace(
            trajectory,
            prompt=replace(
                trajectory.prompt,
                teacher_ids=prompt.teacher_ids,
                context=prompt.context,
                context_id=prompt.context_id,
                own_context=prompt.own_context,
            ),
        )

    async def _call(self, columns: Mapping[str, Any], response: str) -> str | None:
        async with self._slots:
            try:
                async with asyncio.timeout(self._timeout_s):
                    text = await self._hook(columns, user_text(columns), response)
            except TimeoutError as error:
                why = f"no answer within {self._timeout_s:g} s (context.call_timeout_s)"
                raise AnswerContextError(f"context.from_rollout {self._name}: {why}") from error
            except Exception as error:  # a user's function may raise anything
                raise AnswerContextError(
                    f"context.from_rollout {self._name}: {type(error).__name__}: {one_line(error)}"
                ) from error
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise AnswerContextError(
                f"context.from_rollout {self._name}: returned {text!r:.40}, expected a text, or None to leave the "
                "answer out"
            )
        return text


def user_text(columns: Mapping[str, Any]) -> str:
    """The raw prompt, or the content of the last user turn."""
    if columns.get("prompt") is not None:
        return str(columns["prompt"])
    return next(str(turn["content"]) for turn in reversed(columns["messages"]) if turn["role"] == "user")
