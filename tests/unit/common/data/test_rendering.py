"""The renderer: what each side sees, token by token."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest

from common.config.model import StudentConfig
from common.data.rendered_checks import length_faults
from common.data.rendering import SEPARATOR, Renderer, common_prefix, teacher_sequence
from common.data.rows import DataError, Message, Row
from common.protocol.schema import Prompt, context_hash
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer
from tests.support.tokenizers import build_tokenizer

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
)


def renderer(tokenizer: Any = None, *, context: str = "Rules.", placement: Any = None, **student: Any) -> Renderer:
    return Renderer(
        tokenizer or make_tokenizer(), context, StudentConfig(model="unused", **student), placement=placement
    )


def chat_row(*contents: str, system: str | None = None) -> Row:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Row.model_validate({"id": "r", "messages": messages})


def sides(render: Renderer, row: Row) -> tuple[str, str, str]:
    """(student, context, rest of the teacher) as text."""
    prompt = render.render(row)
    context = [] if prompt.context is None else render.contexts[prompt.context].ids.tolist()
    decode = render.tokenizer.decode
    return decode(prompt.student_ids.tolist()), decode(context), decode(prompt.teacher_ids.tolist())


def test_raw_context_and_prompt_are_concatenated_without_a_separator() -> None:
    student, context, rest = sides(renderer(context="Q: a\nA: b\n"), Row(id="r", prompt="Q: cat\nA:"))
    assert (student, context, rest) == ("Q: cat\nA:", "Q: a\nA: b\n", "Q: cat\nA:")


def test_raw_has_exactly_one_bos_which_the_teacher_has_before_the_context() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", bos)]
    )
    render = renderer(tokenizer, context="ctx")
    prompt = render.render(Row(id="r", prompt="hi"))
    assert prompt.student_ids.tolist().count(bos) == 1
    assert prompt.student_ids[0] == bos
    whole = teacher_sequence(prompt, render.contexts)
    assert whole[0] == bos
    assert whole.count(bos) == 1
    assert bos not in prompt.teacher_ids


def test_chat_context_is_the_system_turn_and_the_seam_lies_before_the_user_content() -> None:
    student, context, rest = sides(renderer(), chat_row("Hi"))
    assert student == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert context == "<|im_start|>system\nRules.<|im_end|>\n<|im_start|>user\n"
    assert rest == "Hi<|im_end|>\n<|im_start|>assistant\n"


def test_rows_system_message_follows_the_context() -> None:
    student, context, _ = sides(renderer(), chat_row("Hi", system="Own."))
    assert student.startswith("<|im_start|>system\nOwn.<|im_end|>")
    assert context.startswith("<|im_start|>system\nRules.\n\nOwn.<|im_end|>")


def test_user_prefix_goes_before_the_first_user_content_of_a_conversation() -> None:
    student, context, rest = sides(renderer(placement="user_prefix"), chat_row("Hi", "Yes?", "Bye"))
    assert student == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert context == "<|im_start|>user\nRules.\n\n"
    assert context + rest == student.replace("Hi", "Rules.\n\nHi", 1)


@pytest.mark.parametrize("placement", ["system", "user_prefix"])
def test_both_sides_have_equal_tokens_from_the_last_user_content_on(placement: str) -> None:
    render = renderer(placement=placement)
    prompt = render.render(chat_row("One", "Two", "Three"))
    tail = render.tokenizer("Three<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert prompt.student_ids.tolist()[-len(tail) :] == tail
    assert prompt.teacher_ids.tolist()[-len(tail) :] == tail


def test_a_templates_default_system_turn_is_the_students_unless_configured() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DEFAULT_SYSTEM
    student, context, _ = sides(renderer(tokenizer), chat_row("Hi"))
    assert student.startswith("<|im_start|>system\nBe kind.")
    assert "Be kind." not in context
    with pytest.raises(DataError, match=r"inserts a system turn.*student\.system=text"):
        renderer(tokenizer, system="none").render(chat_row("Hi"))
    student, _, _ = sides(renderer(tokenizer, system="text", system_text=""), chat_row("Hi"))
    assert student.startswith("<|im_start|>system\n<|im_end|>")


def test_system_none_is_accepted_if_the_template_adds_no_system_turn() -> None:
    student, _, _ = sides(renderer(system="none"), chat_row("Hi"))
    assert student.startswith("<|im_start|>user")
    with pytest.raises(DataError, match="row 'r' has a system message"):
        renderer(system="none").render(chat_row("Hi", system="Own."))
    with pytest.raises(DataError, match="row 'r' has a system message"):
        renderer(system="text", system_text="Mine.").render(chat_row("Hi", system="Own."))


def test_a_template_that_folds_the_system_into_the_user_turn_has_no_default_system() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% set lead = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}[INST] {{ lead if loop.first }}{{ m.content }}[/INST]{% endfor %}"
    )
    student, context, rest = sides(renderer(tokenizer, system="none"), chat_row("Hi"))
    assert (student, context, rest) == ("[INST] Hi[/INST]", "[INST] Rules.\n\n", "Hi[/INST]")


def test_a_user_content_that_merges_with_the_context_is_sent_whole_without_a_shared_context() -> None:
    merged = merging([("Ċ", "Ċ")])
    render = renderer(merged)
    prompt = render.render(chat_row("\nHi"))
    assert prompt.context is None
    assert render.without_shared_prefix == ["r"]
    assert "Rules." in merged.decode(prompt.teacher_ids.tolist())


def test_the_templates_date_is_pinned() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d.%m.%Y') }} {{ date_string }}\n" + CHAT_TEMPLATE
    student, _, _ = sides(renderer(tokenizer, template_date=date(2025, 3, 4)), chat_row("Hi"))
    assert student.startswith("04.03.2025 04 Mar 2025\n")


def test_chat_template_kwargs_reach_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if not enable_thinking %}<think></think>{% endif %}"
    student, _, rest = sides(renderer(tokenizer, chat_template_kwargs={"enable_thinking": False}), chat_row("Hi"))
    assert student.endswith("<think></think>")
    assert rest.endswith("<think></think>")
    tokenizer.chat_template = "{{ date_string }}" + CHAT_TEMPLATE
    student, _, _ = sides(renderer(tokenizer, chat_template_kwargs={"date_string": "today"}), chat_row("Hi"))
    assert student.startswith("today<|im_start|>")  # over the pinned one


def test_a_template_that_renders_the_user_content_differently_under_context_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if messages[0].role == 'system' %}!{% endif %}"
    with pytest.raises(DataError, match="renders the last user content differently"):
        renderer(tokenizer).render(chat_row("Hi"))


@pytest.mark.parametrize(("placement", "row"), [("prefix", chat_row("Hi")), ("system", Row(id="r", prompt="x"))])
def test_a_placement_that_does_not_fit_the_row_is_refused(placement: str, row: Row) -> None:
    with pytest.raises(DataError, match="row 'r'"):
        renderer(placement=placement).render(row)


def test_double_bos_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match="two BOS"):
        renderer(tokenizer).render(chat_row("Hi"))


def test_each_context_has_the_prefix_of_its_own_text() -> None:
    """One renderer with several contexts, as for a pool, and with rows that have system messages."""
    render = renderer()
    other = render.with_context("Other rules.")
    for one, text in ((render, "Rules."), (other, "Other rules."), (render, "Rules.")):
        for own in (None, "Own.", "Another."):
            _, context, rest = sides(one, chat_row("Hi", system=own))
            assert (
                context
                == f"<|im_start|>system\n{text}{'' if own is None else SEPARATOR + own}<|im_end|>\n<|im_start|>user\n"
            )
            assert rest.startswith("Hi")
    assert len(render.contexts) == 6
    assert other.contexts is render.contexts


def test_a_tail_with_other_tokens_after_the_context_is_refused() -> None:
    """The text is equal, but context end, a content of one character and the next text merge into one token."""
    tokenizer = merging([("Ċ", "7"), ("Ċ7", "]")])
    tokenizer.chat_template = "{% for m in messages %}{{ '[' ~ m.content ~ ']' }}{% endfor %}"
    with pytest.raises(DataError, match="the last 1 prompt tokens differ between student and teacher"):
        renderer(tokenizer, placement="user_prefix").render(chat_row("7"))


def test_a_content_with_other_tokens_after_the_context_is_accepted() -> None:
    """Only the tokens after the content must be equal: the answer follows them."""
    tokenizer = merging([("Ċ", "7")])
    tokenizer.chat_template = "{% for m in messages %}{{ '[' ~ m.content ~ ']' }}{% endfor %}"
    prompt = renderer(tokenizer, placement="user_prefix").render(chat_row("7"))
    assert prompt.student_ids.tolist()[-2:] != prompt.teacher_ids.tolist()[-2:]
    assert prompt.student_ids[-1] == prompt.teacher_ids[-1]


def test_the_last_occurrence_of_a_content_counts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DEFAULT_SYSTEM
    student, _, rest = sides(renderer(tokenizer), chat_row("kind"))
    assert student.startswith("<|im_start|>system\nBe kind.")
    assert rest.startswith("kind<|im_end|>")


def test_an_answer_that_the_template_drops_has_no_follow_up() -> None:
    tokenizer = make_tokenizer()
    follow = renderer(tokenizer).follow_up([Message(role="user", content="Down.")])
    assert tokenizer.decode(follow) == "<|im_end|>\n<|im_start|>user\nDown.<|im_end|>\n<|im_start|>assistant\n"
    for role in ("assistant", "user"):
        tokenizer.chat_template = f"{{% for m in messages if m.role != '{role}' %}}[{{{{ m.content }}}}]{{% endfor %}}"
        with pytest.raises(DataError, match=r"does not render an answer|leaves out or changes a user message"):
            renderer(tokenizer).follow_up([Message(role="user", content="Down.")])


def merging(merges: list[tuple[str, str]]) -> Any:
    """The byte tokenizer with these pairs merged."""
    from tokenizers import Tokenizer, models

    tokenizer = make_tokenizer()
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    for place, (first, second) in enumerate(merges):
        vocabulary[first + second] = 400 + place
    tokenizer.backend_tokenizer.model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).model
    tokenizer.backend_tokenizer.pre_tokenizer.use_regex = False
    return tokenizer


def test_context_name_depends_on_tokens_and_tokenizer_only() -> None:
    first, second = renderer(), renderer()
    assert first.render(chat_row("Hi")).context == second.render(chat_row("Bye")).context
    assert first.render(chat_row("Hi")).context != renderer(context="Rules!").render(chat_row("Hi")).context
    ids = next(iter(first.contexts.values())).ids
    assert context_hash("00" * 32, ids) != context_hash("11" * 32, ids)


def test_every_too_long_row_is_named_with_its_numbers() -> None:
    answer, limit = ("rollout.max_tokens", 10), ("teacher.max_sequence_tokens", 100)
    lines = length_faults("data.train: ", "teacher", {"a": 90, "b": 91, "c": 92}, answer=answer, limit=limit)
    assert lines[0] == (
        "data.train: row 'b': 101 teacher tokens (91 of prompt, 10 of answer), at most 100 "
        "(teacher.max_sequence_tokens): shorten the row or lower rollout.max_tokens"
    )
    assert [line.split(":")[1] for line in lines] == [" row 'b'", " row 'c'"]
    for count, last in ((20, "row '19'"), (21, "... and 1 more")):
        lines = length_faults("", "student", {str(i): 100 for i in range(count)}, answer=answer, limit=limit)
        assert len(lines) == count
        assert lines[-1].startswith(last)


def test_common_prefix() -> None:
    assert common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)]) == (1, 2)
    assert common_prefix([(1,), (2,)]) == ()


@pytest.mark.parametrize("content", [{"prompt": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}])
def test_a_prompt_keeps_answer_and_teacher_of_its_row(content: dict[str, Any]) -> None:
    prompt = renderer().render(Row.model_validate({"id": "r", "answer": "Yes", "teacher": "large", **content}))
    assert (prompt.row_id, prompt.answer, prompt.teacher) == ("r", "Yes", "large")


def test_prompt_ids_are_uint32() -> None:
    prompt = renderer().render(chat_row("Hi"))
    assert isinstance(prompt, Prompt)
    assert prompt.student_ids.dtype == prompt.teacher_ids.dtype == "uint32"


# --- templates and texts that would train on something else -----------------------------------------------------------

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
RAISES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)


def test_a_context_that_the_template_leaves_out_is_refused() -> None:
    """Else student and teacher would see the same, and the run would train on noise."""
    tokenizer = build_tokenizer(NO_SYSTEM)
    with pytest.raises(DataError, match=r"row 'r': the context is nowhere in the teacher's prompt.*user_prefix"):
        renderer(tokenizer).render(chat_row("Hi"))
    prompt = renderer(tokenizer, placement="user_prefix").render(chat_row("Hi"))
    assert tokenizer.decode(prompt.student_ids.tolist()) == "<|im_start|>Hi<|im_end|>"


def test_a_message_that_the_template_leaves_out_is_refused() -> None:
    tokenizer = build_tokenizer(NO_SYSTEM)
    with pytest.raises(DataError, match="leaves out or changes a system message: 'Own"):
        renderer(tokenizer, placement="user_prefix").render(chat_row("Hi", system="Own."))
    last_only = "{{ messages[0].content if messages[0].role == 'system' }}{{ messages[-1].content }}"
    with pytest.raises(DataError, match="leaves out or changes a user message: 'One"):
        renderer(build_tokenizer(last_only)).render(chat_row("One", "Two", "Three"))


def test_what_a_template_raises_is_one_line_with_the_row_and_the_remedy() -> None:
    render = renderer(build_tokenizer(RAISES))
    with pytest.raises(
        DataError, match=r"^row 'r': the chat template refuses the messages: no system turn; .*user_prefix"
    ):
        render.render(chat_row("Hi"))
    two = Row.model_validate({"id": "u", "messages": [{"role": "user", "content": one} for one in ("one", "two")]})
    with pytest.raises(DataError, match=r"^row 'u': the chat template refuses the messages: turns must alternate$"):
        renderer(build_tokenizer(RAISES), placement="user_prefix").render(two)
    broken = build_tokenizer("{{ messages[0].content.nothing() }}")
    with pytest.raises(DataError, match=r"^row 'r': the chat template refuses"):
        renderer(broken).render(chat_row("Hi"))


def test_a_template_that_refuses_system_turns_needs_none_for_user_prefix() -> None:
    render = renderer(build_tokenizer(RAISES), placement="user_prefix", system="none")
    student, context, rest = sides(render, chat_row("Hi"))
    assert student == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>model\n"
    assert context + rest == "<|im_start|>user\nRules.\n\nHi<|im_end|>\n<|im_start|>model\n"


def test_messages_without_a_chat_template_are_one_line() -> None:
    with pytest.raises(DataError, match="row 'r' has messages, and the tokenizer of unused has no chat template"):
        renderer(build_tokenizer(None)).render(chat_row("Hi"))


@pytest.mark.parametrize(
    ("adds_bos", "why"), [(True, "adds one as well"), (False, "between the context and the prompt")]
)
def test_a_raw_prompt_that_begins_with_bos_is_refused(adds_bos: bool, why: str) -> None:
    """Rows that were rendered with a chat template beforehand: the tokenizer would add another BOS."""
    tokenizer = build_tokenizer(None, bos="<s>", adds_bos=adds_bos)
    with pytest.raises(DataError, match=f"row 'r': the prompt begins with a BOS token, and .*{why}"):
        renderer(tokenizer).render(Row(id="r", prompt="<s>Q: cat"))
    assert renderer(tokenizer).render(Row(id="r", prompt="Q: <s> cat"))


def test_a_raw_context_that_begins_with_bos_is_refused() -> None:
    with pytest.raises(DataError, match="the context begins with a BOS token"):
        renderer(build_tokenizer(None, bos="<s>", adds_bos=True), context="<s>Rules.").render(Row(id="r", prompt="Q:"))


def test_two_bos_tokens_of_the_teacher_are_refused() -> None:
    """The context's text holds the BOS that the template writes before the system turn."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
    tokenizer = build_tokenizer(template, bos="<s>")
    with pytest.raises(DataError, match="two BOS tokens on the teacher's side"):
        renderer(tokenizer, context="<s>Rules.").render(chat_row("Hi"))


def test_a_template_can_keep_its_own_date() -> None:
    template = (
        "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
        + (CHAT_TEMPLATE)
    )
    pinned, _, _ = sides(renderer(build_tokenizer(template)), chat_row("Hi"))
    own, _, _ = sides(renderer(build_tokenizer(template), template_date="template"), chat_row("Hi"))
    assert pinned.startswith("01 Jan 2026<")
    assert own.startswith("26 Jul 2024<")


# --- turns --------------------------------------------------------------------------------------------------------


TURNS = json.dumps(
    [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "dog"},
        {"role": "assistant", "content": "dogs \U0001f415"},
    ]
)


@pytest.mark.parametrize("system", [None, "Own."])
def test_a_list_of_messages_becomes_turns_before_the_rows_chat(system: str | None) -> None:
    student, context, rest = sides(renderer(context=TURNS, placement="turns"), chat_row("cat", system=system))
    own = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert student == f"{own}<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n"
    lead = "Rules." if system is None else f"Rules.\n\n{system}"
    assert context == (
        f"<|im_start|>system\n{lead}<|im_end|>\n<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\n"
        "dogs \U0001f415<|im_end|>\n<|im_start|>user\n"
    )
    assert rest == "cat<|im_end|>\n<|im_start|>assistant\n"


def test_turns_may_be_yaml_and_need_no_system_message() -> None:
    text = "- {role: user, content: dog}\n- role: assistant\n  content: |-\n    two\n    lines\n"
    _, context, _ = sides(renderer(context=text, placement="turns"), chat_row("cat"))
    assert context.startswith("<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\ntwo\nlines<|im_end|>")
    _, context, _ = sides(renderer(context=text, placement="turns"), chat_row("cat", system="Own."))
    assert context.startswith("<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\ndog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Answer briefly.", "needs a list of messages in JSON or YAML, .*, not str"),
        ("[]", "an empty list"),
        ("- {role: user, content: dog", "neither JSON nor YAML"),
        ("- {role: user, content: 7}\n", r"message 1 of the context: content: Input should be a valid string"),
        ("- {role: human, content: a}\n", r"message 1 of the context: role: "),
        (
            "- {role: user, content: a}\n",
            "end with the assistant's, before the row's chat; they are user",
        ),
        ("- {role: assistant, content: a}\n", "must hold a user's turn"),
        (
            "- {role: user, content: a}\n- {role: system, content: b}\n- {role: assistant, content: c}\n",
            "only be the first",
        ),
    ],
)
def test_a_context_that_is_no_list_of_turns_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        renderer(context=text, placement="turns").render(chat_row("cat"))


def test_a_template_that_changes_a_turn_of_the_context_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message.content", "message.content.split('</think>')[-1]")
    text = json.dumps([{"role": "user", "content": "dog?"}, {"role": "assistant", "content": "<think>b</think>c"}])
    with pytest.raises(DataError, match=r"row 'r': the context: .* an answer, '<think>b</think>c'"):
        renderer(tokenizer, context=text, placement="turns").render(chat_row("cat"))
    tokenizer.chat_template = CHAT_TEMPLATE.replace("in messages", "in messages[-1:]")
    with pytest.raises(DataError, match=r"row 'r': the context: .* a user message: 'dog\?'"):
        renderer(tokenizer, context=text, placement="turns").render(chat_row("cat"))


def test_turns_are_for_chat_rows() -> None:
    with pytest.raises(DataError, match=r"context\.placement 'turns' needs `messages`"):
        renderer(context=TURNS, placement="turns").render(Row(id="r", prompt="Q"))
