"""A problem and what the model did about it, as text for the model to look back at. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from common.data.rows import Row
from common.evaluation.graders import after_thinking
from rollout_workers.environments.episodes import Exchange


def problem_of(row: Row) -> str:
    """What a prompt asks: raw text, the one user turn, or the conversation with the names of who speaks."""
    if row.prompt is not None:
        return row.prompt
    messages = row.messages or ()
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def answer_trace(answer: str) -> str:
    """An answer without its thinking; all of it where the thinking never ended."""
    return after_thinking(answer).strip()


def game_trace(exchanges: Sequence[Exchange], outcome: str) -> str:
    """A game turn by turn, with what the environment said at the end; its reward stays unsaid."""
    turns = [
        f"[Turn {number}]\n{exchange.observation}\n\n[Move {number}]\n{answer_trace(exchange.answer)}"
        for number, exchange in enumerate(exchanges, start=1)
    ]
    return "\n\n".join([*turns, f"[End]\n{outcome or 'The turns ran out.'}"])
