"""Checks of a rendered row: the template kept every part, both sides end alike, nothing is too long. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from common.data.rows import DataError, Row
from common.data.special_tokens import leading_count
from common.data.turns import read_turns

Placement = Literal["prefix", "system", "user_prefix", "turns"]
Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None


def check_context(name: str, placement: Placement, context: str, teacher_text: str) -> None:
    """Raise DataError if the template leaves the context, or one of its turns, out."""
    if placement == "turns":
        _check_turns(name, context, teacher_text)
    elif context.strip() not in teacher_text:
        remedy = "try context.placement=user_prefix" if placement == "system" else "try context.placement=system"
        raise DataError(
            f"{name}: the context is nowhere in the teacher's prompt: this chat template leaves out "
            f"{'system turns' if placement == 'system' else 'a part of the user turn'} or changes them; {remedy}"
        )


def _check_turns(name: str, context: str, teacher_text: str) -> None:
    turns = read_turns(context)
    check_contents(f"{name}: the context", [turn.as_dict() for turn in turns], teacher_text, None)
    for turn in turns:
        if turn.role == "assistant" and turn.content.strip() not in teacher_text:
            raise DataError(
                f"{name}: the context: this chat template leaves out or changes an answer, {turn.content[:40]!r}, for "
                "example its thoughts: write the answer as the template shows it"
            )


def check_contents(name: str, messages: Messages, text: str, tools: Tools) -> None:
    """Raise DataError if a template leaves out a message, a tool call or a tool, in silence."""
    calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    for kind, names in (("tool call", calls), ("tool", [_tool_name(tool) for tool in tools or ()])):
        for missing in (one for one in names if one not in text):
            raise DataError(
                f"{name}: this chat template leaves out the {kind} {missing!r}: use a model whose template knows tools"
            )
    for message in messages:
        content = message["content"]
        as_json = json.dumps(content.strip(), ensure_ascii=False)[1:-1]  # so do some templates show a tool's result
        shown = content.strip() in text or (message["role"] == "tool" and as_json in text)
        if message["role"] != "assistant" and not shown:
            raise DataError(
                f"{name}: this chat template leaves out or changes a {message['role']} message: {content[:40]!r}"
            )


def check_tail(row: Row, content: str, student_text: str, teacher_text: str) -> None:
    """Raise DataError unless both sides have equal text from the last user content onward."""
    tail = student_text[max(student_text.rfind(content.strip()), 0) :]
    if content.strip() not in student_text or not teacher_text.endswith(tail):
        raise DataError(
            f"row {row.id!r}: this chat template renders the last user content differently with the context; try "
            "another context.placement"
        )


def check_ends(row: Row, after: int, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> None:
    """Raise DataError unless the last `after` tokens, those between the last user content and the answer, are equal."""
    if after and tuple(student_ids[-after:]) != tuple(teacher_ids[-after:]):
        raise DataError(
            f"row {row.id!r}: the last {after} prompt tokens differ between student and teacher although their "
            "text is equal: the tokenizer merges across the context's end; try another context.placement"
        )


def check_bos(row: Row, bos: int | None, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> None:
    """Raise DataError if a side begins with two BOS tokens; `bos` is None for a tokenizer without one."""
    for side, ids in (("student", student_ids), ("teacher", teacher_ids)):
        if bos is not None and leading_count(ids, bos) > 1:
            raise DataError(
                f"row {row.id!r} starts with two BOS tokens on the {side}'s side: remove the one in its text"
            )


def check_raw_bos(row: Row, bos: int | None, name: str, ids: Sequence[int], lead: Sequence[int]) -> None:
    """Raise DataError for a text that begins with the BOS that the tokenizer, or the context, puts before it."""
    if bos is None or not leading_count(ids, bos) or (name == "context" and not lead):
        return
    why = "the tokenizer adds one as well" if lead else "it would stand between the context and the prompt"
    raise DataError(f"row {row.id!r}: the {name} begins with a BOS token, and {why}: remove it from the text")


def _tool_name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))


def missing_end(name: str, student_head: str, teacher_head: str) -> str:
    """Return the text that the student has before the answer and the teacher lacks at its end.

    Raises DataError if the teacher's prompt ends with something that the student's lacks: the answer's first token
    would then stand at another place of the template.
    """
    if student_head.startswith(teacher_head):
        return student_head[len(teacher_head) :]
    raise DataError(
        f"{name}: the answer follows {student_head!r} for the student and {teacher_head!r} for the teacher: choose "
        "context.chat_template_kwargs and student.chat_template_kwargs with which both prompts end alike"
    )


def length_faults(
    lead: str,
    side: Literal["student", "teacher"],
    prompt_tokens: Mapping[str, int],
    *,
    answer: tuple[str, int],
    limit: tuple[str, int],
) -> list[str]:
    """Return a line, after `lead`, for every row (the first 20) whose prompt plus answer is longer than `limit`.

    `prompt_tokens` maps row id to prompt tokens; the teacher's include the context. `answer` and `limit` are pairs of
    the name that decides the number, and the number.
    """
    faults = [
        f"{lead}row {row!r}: {tokens + answer[1]} {side} tokens ({tokens} of prompt, {answer[1]} of answer), at most "
        f"{limit[1]} ({limit[0]}): shorten the row or lower {answer[0]}"
        for row, tokens in prompt_tokens.items()
        if tokens + answer[1] > limit[1]
    ]
    more = [f"{lead}... and {len(faults) - 20} more"] if len(faults) > 20 else []
    return faults[:20] + more
