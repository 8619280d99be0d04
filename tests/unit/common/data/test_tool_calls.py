"""Rows with tools, tool calls and tool results: rendered as the chat template does, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.config.model import StudentConfig
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Message, Row, read_rows
from tests.support.tiny import CHAT_TEMPLATE, TOOL_TEMPLATE, make_tokenizer

TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "id": "c1", "function": {"name": "calculator", "arguments": {"expression": "12 * 7"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "12 times 7?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "calculator", "tool_call_id": "c1", "content": "84"},
]


def renderer(template: str = TOOL_TEMPLATE, context: str = "Use tools.", **options: Any) -> Renderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, context, StudentConfig(model="unused"), **options)


def row_of(messages: list[dict[str, Any]] = CHAT, **columns: Any) -> Row:
    return Row.model_validate({"id": "r", "messages": messages, "tools": TOOLS, **columns})


def by_transformers(render: Renderer, messages: list[dict[str, Any]]) -> list[int]:
    return list(
        render.tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    )


@pytest.mark.parametrize("placement", ["system", "user_prefix"])
@pytest.mark.parametrize("messages", [CHAT, [*CHAT, {"role": "assistant", "content": "84."}, CHAT[0]]])
def test_both_sides_see_what_transformers_renders(placement: Any, messages: list[dict[str, Any]]) -> None:
    render = renderer(placement=placement)
    prompt = render.render(row_of(messages))
    assert prompt.student_ids.tolist() == by_transformers(render, messages)
    teacher = (
        [{"role": "system", "content": "Use tools."}, *messages]
        if placement == "system"
        else [{"role": "user", "content": "Use tools.\n\n12 times 7?"}, *messages[1:]]
    )
    assert teacher_sequence(prompt, render.contexts) == by_transformers(render, teacher)
    assert prompt.context is not None
    assert "calculator" in render.tokenizer.decode(render.contexts[prompt.context].ids)  # the tools are in the prefix


def test_the_teachers_chat_may_hold_other_calls() -> None:
    render = renderer(context="", contexts_travel=True)
    teacher = [CHAT[0], {**CHAT[1], "content": "Let me see."}, {**CHAT[2], "content": "84, checked"}]
    prompt = render.render(row_of(teacher_messages=teacher))
    assert teacher_sequence(prompt, {}) == by_transformers(render, teacher)
    assert prompt.student_ids.tolist() == by_transformers(render, CHAT)


def test_arguments_and_tools_as_json_text_are_their_values(tmp_path: Path) -> None:
    """So OpenAI's API writes arguments, and so data sets with many tools store them."""
    text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps({"expression": "12 * 7"})}}
    line = {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [text]}, CHAT[2]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**line, "tools": json.dumps(TOOLS)}))
    (row,) = read_rows(tmp_path / "rows.jsonl")
    render = renderer()
    assert render.render(row).student_ids.tolist() == by_transformers(render, CHAT)


def test_a_tool_result_that_a_template_writes_as_json_is_shown() -> None:
    template = TOOL_TEMPLATE.replace("{{ message.content }}", "{{ message.content | tojson }}")
    result = [*CHAT[:2], {**CHAT[2], "content": 'say "84"'}]
    assert renderer(template, "Use tools.").render(row_of(result)).student_ids.size


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (CHAT_TEMPLATE, "leaves out the tool call 'calculator'"),
        (TOOL_TEMPLATE.replace("{% if tools %}", "{% if False %}").replace("call.function", "''"), "the tool call"),
        (
            TOOL_TEMPLATE.replace("{{ message.content }}", "{{ '' if message.role == 'tool' else message.content }}"),
            "84",
        ),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(template: str, part: str) -> None:
    with pytest.raises(DataError, match=part):
        renderer(template).render(row_of())


def test_a_template_without_tools_is_refused() -> None:
    with pytest.raises(DataError, match="leaves out the tool 'calculator'"):
        renderer(CHAT_TEMPLATE).render(row_of([CHAT[0]]))


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"role": "user", "content": "u", "tool_calls": [CALL]}, "tool_calls belong to the assistant"),
        ({"role": "user", "content": "u", "name": "x"}, "belong to role `tool`"),
        ({"role": "assistant"}, "content: Field required"),
        ({"role": "assistant", "tool_calls": [{"name": "calculator"}]}, "a tool call is"),
    ],
)
def test_a_turn_of_another_form_is_named(message: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Message.model_validate(message)


def test_a_chat_ends_with_the_user_or_a_tool_and_has_a_user() -> None:
    with pytest.raises(ValueError, match="must be the user's or a tool's"):
        row_of([*CHAT, {"role": "assistant", "content": "84."}])
    with pytest.raises(ValueError, match="one message must be the user's"):
        row_of(CHAT[1:])


def test_a_tools_column_of_raw_prompts_and_games_is_another_column() -> None:
    assert Row.model_validate({"id": "r", "prompt": "p", "tools": "hammer"}).tools is None
    assert Row.model_validate({"id": "r", "environment": "FrozenLake", "tools": 3}).tools is None
