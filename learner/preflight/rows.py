"""Checks of the rendered rows: lengths, token ids and top-k against the models that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common.config.model import Config, StudentConfig, TeacherConfig
from common.data.fingerprint import vocabulary_fault
from common.data.model_lookup import load_model_config, load_tokenizer, model_limit
from common.data.rendered_checks import length_faults
from common.data.rows import DataError, Message
from learner.data.inputs import Inputs, answer_limit, make_renderer
from learner.data.prompts import PromptFacts
from learner.preflight.models import is_on_this_machine
from learner.preflight.report import Finding, error, warning


def check_lengths(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find rows that are too long for a teacher, or for the engine that answers with the context."""
    for name, section in config.named_teachers().items():
        model = section.model or config.student.model
        if section.url is not None or section.kind == "base" or not is_on_this_machine(model):
            continue
        key = "teacher" if name == "default" else f"teachers.{name}"
        rows = [row for row in inputs.facts["data.train"] if row.teacher == name]
        yield from _too_long("data.train", rows, config, inputs, f"{key}.max_sequence_tokens", model, section)
    teacher = config.answering_model
    if teacher is None or not is_on_this_machine(teacher):
        return
    # An engine of the teacher's model answers with the context, to measure accuracy and for stored answers.
    limit_key = "student.max_sequence_tokens"
    for key in ("data.eval", "data.train") if config.rollout.teacher_answers else ("data.eval",):
        yield from _too_long(key, inputs.facts.get(key, ()), config, inputs, limit_key, teacher, config.student)


def _too_long(
    key: str,
    rows: Sequence[PromptFacts],
    config: Config,
    inputs: Inputs,
    limit_key: str,
    model: str,
    section: StudentConfig | TeacherConfig,
) -> Iterator[Finding]:
    limits = {limit_key: section.max_sequence_tokens, f"the limit of {model}": model_limit(model)}
    known = [(limit, name) for name, limit in limits.items() if limit is not None]
    if not known:
        return
    (limit, name), (answer_key, answer) = min(known), answer_limit(config, key)
    context = max((len(one.ids) for one in inputs.contexts.values()), default=0)
    if rows and context + answer >= limit:  # one line, not one for each row
        yield error(
            f"the context has {context:,} tokens, which with the longest answer ({answer_key} {answer}) leaves no room "
            f"for a prompt within {limit:,} ({name}): shorten the context"
        )
        return
    tokens = {row.row_id: row.teacher_tokens for row in rows}
    yield from map(
        error, length_faults(f"{key}: ", "teacher", tokens, answer=(answer_key, answer), limit=(name, limit))
    )


def check_token_ids(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find token ids outside a model's embedding: a tokenizer can hold more tokens than its model."""
    student = config.student.model
    width = int(load_model_config(student).vocab_size)
    for key, rows in inputs.facts.items():
        for row in rows:
            yield from _outside(f"{key}: row {row.row_id!r}", row.student_max_id, "student.model", student, width)
    for name, chunks in inputs.texts.items():
        for chunk in chunks:
            largest = max([*chunk.prompt_ids.tolist(), *chunk.response_ids.tolist()], default=0)
            yield from _outside(f"eval.perplexity.{name}", largest, "student.model", student, width)
    for name, section in config.named_teachers().items():
        model = section.model or student
        if section.url is not None or not is_on_this_machine(model):
            continue
        key = ("teacher" if name == "default" else f"teachers.{name}") + ".model"
        width = int(load_model_config(model).vocab_size)
        for context in inputs.contexts.values():
            yield from _outside("the context", int(context.ids.max()), key, model, width)
        for row in inputs.facts["data.train"]:
            if row.teacher == name:
                yield from _outside(f"data.train: row {row.row_id!r}", row.teacher_max_id, key, model, width)


def check_follow_ups(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find a chat template that cannot go on with a game as one conversation: it drops answers, or adds unknown ids."""
    if config.environment.sample_format != "conversation" or not any(row.game for row in inputs.facts["data.train"]):
        return
    renderer = make_renderer(load_tokenizer(config.student.model), "", config.student, config.context)
    try:
        ids = renderer.follow_up([Message(role="user", content="observation")])
    except DataError as fault:
        yield error(f"environment.sample_format `conversation`: {fault}; use `chat` or `observation`")
        return
    models = {"student.model": config.student.model}
    for name, section in config.named_teachers().items():
        if section.url is None and section.model is not None and is_on_this_machine(section.model):
            models[("teacher" if name == "default" else f"teachers.{name}") + ".model"] = section.model
    for key, model in models.items():
        yield from _outside("a game's next turn", max(ids), key, model, int(load_model_config(model).vocab_size))


def check_tokenizers(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find a teacher to which the student's token ids mean other text, or whose own ids the student cannot score."""
    student = load_tokenizer(config.student.model)
    for name, section in config.named_teachers().items():
        model = section.model
        if section.url is not None or model in (None, config.student.model) or not is_on_this_machine(str(model)):
            continue
        key = ("teacher" if name == "default" else f"teachers.{name}") + f".model {model}"
        tokenizer = load_tokenizer(str(model))
        if (fault := vocabulary_fault(student, tokenizer)) is not None:
            yield error(f"{key} has another tokenizer than student.model: {fault}; use models of one family")
        width = int(load_model_config(config.student.model).vocab_size)
        if config.loss.support != "student" and (last := max(tokenizer.get_vocab().values())) >= width:
            yield error(
                f"loss.support `{config.loss.support}` takes ids of {key}, up to {last}, and the student has {width} "
                "outputs: set loss.support to `student`"
            )


def _outside(place: str, largest: int, key: str, model: str, width: int) -> Iterator[Finding]:
    if largest >= width:
        yield error(
            f"{place}: token id {largest} is not in the embedding of {key} {model}, which has {width} rows: the "
            "tokenizer has more tokens than the model; use the tokenizer that the model was trained with"
        )


def check_top_k(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find a top-k above the vocabulary, and ``loss.form: exact`` below it."""
    width = int(load_model_config(config.student.model).vocab_size)
    if config.loss.top_k > width:
        yield error(f"loss.top_k is {config.loss.top_k}, the vocabulary of {config.student.model} has {width} ids")
    elif config.loss.form == "exact" and config.loss.top_k != width:
        yield error(
            f"loss.form `exact` is over the whole vocabulary of {width}, loss.top_k is {config.loss.top_k}; set "
            f"loss.top_k={width} (for small vocabularies), or loss.form=tail"
        )


def check_bos(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Find rows that begin with the BOS token for one of student and teacher alone: their positions then differ."""
    bos = load_tokenizer(config.student.model).bos_token_id
    if bos is None:
        return
    for key in ("data.train", "data.valid", "data.eval"):
        rows = inputs.facts.get(key, [])
        uneven = [row.row_id for row in rows if (row.student_first_id == bos) != (row.teacher_first_id == bos)]
        if uneven:
            yield warning(
                f"{key}: {len(uneven)} rows begin with the BOS token for one of student and teacher alone, because of "
                f"the chat template; the first is row {uneven[0]!r}"
            )


def input_warnings(config: Config, inputs: Inputs) -> Iterator[Finding]:
    """Pass on the likely mistakes that rendering found."""
    yield from map(warning, inputs.warnings)
    if config.context.from_rollout is not None and inputs.eval:
        yield warning(
            "context.from_rollout: a context belongs to an answer, so the accuracy with the context is not measured, "
            "nor the gap that training closes"
        )
    if config.context.from_rows and not inputs.has_context_for_eval:
        yield warning(
            "data.eval has rows without a context of their own: the accuracy with the context is not measured, nor the "
            "gap that training closes"
        )
