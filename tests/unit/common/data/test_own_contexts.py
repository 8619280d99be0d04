"""Rows with their own contexts: what each side sees, which tokens travel, what several rows share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.config.model import StudentConfig
from common.data.rendering import MIN_PARENT_TOKENS, Renderer, teacher_sequence
from common.data.rows import DataError, Row
from common.protocol.schema import Prompt, context_hash
from tests.support.tiny import CHAT_TEMPLATE, TOOL_TEMPLATE, make_tokenizer

THINKING = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if not think %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
ADD = {"type": "function", "function": {"name": "add"}}
SHARED = "Follow these rules in every answer."


def renderer(context: str = "", *, template: str = CHAT_TEMPLATE, **options: Any) -> Renderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    student = StudentConfig(model="unused", chat_template_kwargs=options.pop("student_kwargs", {}))
    return Renderer(tokenizer, context, student, contexts_travel=True, **options)


def row(question: str = "Hi", *, row_id: str = "r", system: str | None = None, **own: Any) -> Row:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return Row.model_validate({"id": row_id, "messages": [*messages, {"role": "user", "content": question}], **own})


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def whole(render: Renderer, prompt: Prompt) -> str:
    """The teacher's whole prompt as text."""
    return str(render.tokenizer.decode(teacher_sequence(prompt, render.contexts)))


def expected(render: Renderer, messages: list[dict[str, str]], **options: Any) -> list[int]:
    """The ids of a chat by transformers' own call."""
    return list(
        render.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    )


@pytest.mark.parametrize(
    ("placement", "teacher"),
    [
        ("system", chat("Hi", system="Rules.\n\nDo this.\n\nBe kind.")),
        ("user_prefix", chat("Rules.\n\nDo this.\n\nHi", system="Be kind.")),
    ],
)
def test_a_rows_context_follows_the_text_for_all_rows(placement: Any, teacher: list[dict[str, str]]) -> None:
    render = renderer("Rules.", placement=placement)
    prompt = render.render(row(system="Be kind.", context="Do this."))
    assert teacher_sequence(prompt, {}) == expected(render, teacher)
    assert prompt.student_ids.tolist() == expected(render, chat("Hi", system="Be kind."))
    assert prompt.own_context is not None
    assert render.tokenizer.decode(prompt.own_context.ids).endswith("Do this.")
    assert prompt.context == context_hash(render._fingerprint, prompt.own_context.ids)


def test_the_teachers_own_chat_need_not_be_the_students() -> None:
    render = renderer()
    teacher = chat("An example?", "Yes.", "Hi, with a hint", system="Other.")
    prompt = render.render(row(system="Be kind.", teacher_messages=teacher))
    assert teacher_sequence(prompt, {}) == expected(render, teacher)
    assert prompt.student_ids.tolist() == expected(render, chat("Hi", system="Be kind."))
    assert render.tokenizer.decode(prompt.teacher_ids) == "<|im_end|>\n<|im_start|>assistant\n"


def test_the_text_for_all_rows_is_put_into_the_teachers_own_chat() -> None:
    render = renderer("Rules.")
    prompt = render.render(row(teacher_messages=chat("Hi again", system="Other.")))
    assert teacher_sequence(prompt, {}) == expected(render, chat("Hi again", system="Rules.\n\nOther."))


def test_a_raw_row_has_its_context_between_the_shared_text_and_the_prompt() -> None:
    render = renderer("Q: a\nA: b\n")
    prompt = render.render(Row(id="r", prompt="Q: c\nA:", context="Q: d\nA: e\n"))
    assert whole(render, prompt) == "Q: a\nA: b\nQ: d\nA: e\nQ: c\nA:"
    assert render.tokenizer.decode(prompt.student_ids) == "Q: c\nA:"


def test_a_row_without_a_context_has_the_shared_one_or_none() -> None:
    render = renderer("Rules.")
    assert whole(render, render.render(row())).startswith("<|im_start|>system\nRules.<|im_end|>")
    plain = renderer().render(row())
    assert plain.context is None
    assert np.array_equal(plain.teacher_ids, plain.student_ids)
    assert renderer().render(Row(id="r", prompt="p")).context is None


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"context": SHARED}, [row("a", context="One."), row("b", context="Two.")]),
        ({"context": SHARED, "placement": "user_prefix"}, [row("a", context="One."), row("b", context="Two.")]),
        ({"placement": "user_prefix"}, [row("a", system=SHARED, context=c) for c in ("One.", "Two.")]),
        ({}, [row("a", teacher_messages=chat(c, system=SHARED)) for c in ("One.", "Two.")]),
        ({"context": SHARED}, [Row(id="r", prompt="p", context=c) for c in ("One.", "Two.")]),
        (
            {"placement": "user_prefix", "template": TOOL_TEMPLATE},
            [row("a", system=SHARED, context=c, tools=[ADD]) for c in ("One.", "Two.")],
        ),
    ],
)
def test_what_stands_before_the_own_contexts_of_several_rows_is_their_parent(
    options: dict[str, Any], rows: list[Row]
) -> None:
    render = renderer(**options)
    render.share_parents(rows)
    (parent,) = render.contexts.values()
    assert len(parent.ids) >= MIN_PARENT_TOKENS
    assert SHARED in render.tokenizer.decode(parent.ids)
    for one in rows:
        own = render.render(one).own_context
        assert own is not None
        assert own.parent == parent.hash
        assert own.ids[: len(parent.ids)].tolist() == parent.ids.tolist()
        assert len(own.ids) > len(parent.ids)


def test_a_row_that_does_not_begin_with_the_shared_text_has_no_parent() -> None:
    render = renderer(SHARED, template="{% if messages[-1].content == 'odd' %}!{% endif %}" + CHAT_TEMPLATE)
    rows = [row("one", context="A."), row("two", context="B."), row("odd", context="C.")]
    render.share_parents(rows)
    (parent,) = render.contexts
    contexts = [render.render(one).own_context for one in rows]
    assert [one.parent for one in contexts if one is not None] == [parent, parent, None]
    assert render.tokenizer.decode(contexts[2].ids).startswith(f"!<|im_start|>system\n{SHARED}")  # type: ignore[union-attr]


def test_a_text_of_a_single_row_or_of_a_few_tokens_is_no_parent() -> None:
    render = renderer()
    systems = (SHARED, "Other " * 9, None, None)
    render.share_parents([row(teacher_messages=chat("a", system=system)) for system in systems])
    assert render.contexts == {}


@pytest.mark.parametrize("form", [{"prompt": "p"}, {"messages": chat("Hi")}])
@pytest.mark.parametrize("context", [None, "Rules."])
def test_teacher_and_answer_of_a_row_are_those_of_its_prompt(form: dict[str, Any], context: str | None) -> None:
    prompt = renderer().render(Row(id="r", answer="x", teacher="fixed", context=context, **form))
    assert (prompt.row_id, prompt.answer, prompt.teacher) == ("r", "x", "fixed")


def test_contexts_of_rows_are_not_collected() -> None:
    render = renderer("Rules.")
    for number in range(50):
        render.render(row(f"q{number}", context=f"c{number}"))
        render.render(row(f"q{number}", system=f"s{number}"))
    assert render.contexts == {}


def test_the_id_of_a_context_is_that_of_its_content() -> None:
    render = renderer()
    ids = [render.render(row(q, context=c)).context_id for q, c in (("a", "x"), ("b", "x"), ("a", "y"))]
    assert ids[0] == ids[1] != ids[2]


def test_the_teachers_template_arguments_are_apart_from_the_students() -> None:
    template = "{% if effort %}<|im_start|>system\nThink {{ effort }}.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
    render = renderer(template=template, teacher_template_kwargs={"effort": "hard"}, placement="user_prefix")
    prompt = render.render(row(context="Do this."))
    assert teacher_sequence(prompt, {}) == expected(render, chat("Do this.\n\nHi"), effort="hard")
    assert prompt.student_ids.tolist() == expected(render, chat("Hi"))


def test_a_plain_students_end_is_given_to_a_thinking_teacher() -> None:
    render = renderer("Rules.", template=THINKING, teacher_template_kwargs={"think": True})
    for one in (row(), row(context="Do this."), row(teacher_messages=chat("Hi, see this"))):
        prompt = render.render(one)
        end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert render.tokenizer.decode(prompt.student_ids).endswith(end)
        assert whole(render, prompt).endswith(end)


def test_an_end_that_only_the_teacher_has_is_refused() -> None:
    render = renderer("Rules.", template=THINKING, student_kwargs={"think": True}, teacher_template_kwargs={})
    with pytest.raises(DataError, match=r"row 'r': the answer follows .*context\.chat_template_kwargs"):
        render.render(row(context="Do this."))


def test_a_student_content_that_also_stands_in_the_templates_end_is_aligned() -> None:
    render = renderer()
    prompt = render.render(row("a", teacher_messages=chat("assistant")))
    assert teacher_sequence(prompt, {}) == expected(render, chat("assistant"))


def test_a_context_that_the_template_drops_is_refused() -> None:
    render = renderer(template=CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content[:5] }}"))
    with pytest.raises(DataError, match="the context is nowhere in the teacher's prompt"):
        render.render(row(context="A long context."))
    with pytest.raises(DataError, match="leaves out or changes a user message: 'A long"):
        render.render(row(teacher_messages=chat("A long question")))
