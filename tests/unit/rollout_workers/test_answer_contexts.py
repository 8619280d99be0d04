"""Contexts made from answers: what the function gets, what the teacher then sees, and each way in which it can fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.config.model import ConfigError, ContextConfig, StudentConfig
from common.data.answer_hook import load_answer_hook
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import Row
from common.protocol.schema import Trajectory, as_ids
from rollout_workers.answer_contexts import AnswerContextError, AnswerContexts
from tests.support import answer_hooks
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer

HOOKS = "tests.support.answer_hooks"
SYSTEM = "Answer each question in one word."


def contexts(function: str, *, text: str = "", template: str = CHAT_TEMPLATE, **settings: Any) -> AnswerContexts:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, text, StudentConfig(model="unused"), contexts_travel=True)
    return AnswerContexts(ContextConfig(from_rollout=f"{HOOKS}:{function}", **settings), renderer)


def answered(**columns: Any) -> Trajectory:
    row = Row.model_validate({"id": "r", "messages": [{"role": "user", "content": "Hi"}], "answer": "a", **columns})
    row._source = columns or {"id": "r"}
    prompt = Renderer(make_tokenizer(), "", StudentConfig(model="unused")).render(row)
    zeros = np.zeros(2, dtype=np.float32)
    ids = as_ids([5, 6])
    return Trajectory("s", 0, replace(prompt, row=row.columns), ids, zeros, as_ids([[1], [2]]), "stop", ((0, 0),))


async def test_the_teacher_sees_the_text_and_the_student_what_it_saw() -> None:
    made, before = contexts("by_row"), answered(hint="A hint")
    after = await made.apply(before, "Ho")
    assert after is not None
    chat = [{"role": "system", "content": "A hint: 'Hi' was answered 'Ho'"}, {"role": "user", "content": "Hi"}]
    expected = make_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert teacher_sequence(after.prompt, {}) == list(expected)
    assert after.prompt.student_ids.tolist() == before.prompt.student_ids.tolist()
    assert after.response_ids is before.response_ids
    assert after.prompt.answer == "a"
    other = await made.apply(before, "He")
    assert other is not None
    assert other.prompt.context_id != after.prompt.context_id


async def test_raw_rows_have_their_prompt_as_the_prompt() -> None:
    after = await contexts("by_row").apply(answered(messages=None, prompt="Q:", hint="H"), "A")
    assert after is not None
    assert bytes(map(ord, make_tokenizer().decode(teacher_sequence(after.prompt, {})))) == b"H: 'Q:' was answered 'A'Q:"


async def test_a_text_for_all_rows_is_the_parent_of_every_context() -> None:
    made = contexts("by_row", text=SYSTEM)
    parents = set()
    for hint in ("one", "two"):
        after = await made.apply(answered(hint=hint), "Ho")
        assert after is not None
        assert after.prompt.own_context is not None
        assert (
            make_tokenizer().decode(after.prompt.own_context.ids).startswith(f"<|im_start|>system\n{SYSTEM}\n\n{hint}")
        )
        parents.add(after.prompt.own_context.parent)
    assert parents == set(made._renderer.contexts)
    assert len(parents) == 1


async def test_none_leaves_the_answer_out() -> None:
    assert await contexts("by_row").apply(answered(hint="drop"), "Ho") is None


@pytest.mark.parametrize(
    ("function", "columns", "settings", "part"),
    [
        ("by_row", {"hint": "fail"}, {}, r"answer_hooks:by_row: KeyError: 'no such\\nthing'$"),
        ("slow", {"seconds": 5}, {"call_timeout_s": 0.05}, r"no answer within 0.05 s \(context.call_timeout_s\)"),
        ("blank", {}, {}, r"returned ' ', expected a text"),
        ("by_row", {"hint": "x"}, {"template": "{{ messages[-1].content }}"}, "the context is nowhere in the teacher"),
    ],
)
async def test_a_failure_is_one_line(function: str, columns: Any, settings: Any, part: str) -> None:
    with pytest.raises(AnswerContextError, match=part) as caught:
        await contexts(function, **settings).apply(answered(**columns), "Ho")
    assert "\n" not in str(caught.value)


async def test_calls_are_bounded() -> None:
    answer_hooks.CALLS |= {"now": 0, "most": 0}
    made = contexts("slow", max_concurrent_calls=3)
    await asyncio.gather(*(made.apply(answered(), "Ho") for _ in range(12)))
    assert answer_hooks.CALLS["most"] == 3


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("nowhere", "there is no colon"),
        ("no.such:function", "No module named 'no'"),
        (f"{HOOKS}:none", "has no attribute 'none'"),
        (f"{HOOKS}:of_two", "too many positional arguments"),
        (f"{HOOKS}:plain", "not an `async def`"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(spec: str, part: str) -> None:
    with pytest.raises(ConfigError, match=rf"bad value context.from_rollout='{spec}'.*{part}") as caught:
        load_answer_hook(spec)
    assert "\n" not in str(caught.value)
