"""Rendering of a row into the token sequences of student and teacher. No other code renders prompts.

The student sees the row; the teacher sees the row with the context. From the last user content onward both have the
same tokens, and a response is appended to both as tokens, never as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from common.config.model import StudentConfig
from common.data.fingerprint import tokenizer_fingerprint
from common.data.rows import DataError, Row
from common.data.special_tokens import leading_count
from common.error_text import one_line
from common.protocol.schema import Context, Prompt, as_ids, context_hash

Placement = Literal["prefix", "system", "user_prefix"]
Messages = list[dict[str, str]]

SEPARATOR = "\n\n"
"""Text between the context and the rest of its turn."""

_PROBES = ("Alpha", "7", "(z", "\u00e9t\u00e9")
"""User contents that share no first token, so that their renderings share exactly the context's prefix."""


@dataclass
class Renderer:
    """Renders rows into prompts and collects the contexts (token prefixes) that these prompts name.

    Raises DataError, with the row's id, for a row that cannot be rendered as configured.
    """

    tokenizer: Any
    context_text: str
    student: StudentConfig
    placement: Placement | None = None
    contexts: dict[str, Context] = field(default_factory=dict)
    without_shared_prefix: list[str] = field(default_factory=list)
    """Rows whose first user token merges with the context's last token. Their scores are right, but they cannot use the
    context's cache."""
    _fingerprint: str = field(init=False)
    _prefixes: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fingerprint = tokenizer_fingerprint(self.tokenizer)

    def render(self, row: Row) -> Prompt:
        """Return the student's and the teacher's tokens of one row."""
        if row.prompt is not None:
            return self._raw(row, row.prompt)
        return self._chat(row)

    def with_context(self, context_text: str) -> Renderer:
        """Return a renderer for another context that shares the tokenizer and the collected contexts."""
        other = copy(self)
        other.context_text, other._prefixes = context_text, {}
        return other

    def follow_up(self, observation: str) -> tuple[int, ...]:
        """Return the tokens between two answers of one conversation: end of the assistant turn, user turn with
        `observation`, head of the next answer. They are the same for student and teacher and for every history.
        """
        mark = "\u00abanswer\u00bb"
        roles = (("user", "question"), ("assistant", mark), ("user", observation))
        text = self._template([{"role": role, "content": content} for role, content in roles], "a game")
        _, found, after = text.partition(mark)
        if not found or observation.strip() not in after:
            raise DataError("this chat template does not render an answer and the user turn after it unchanged")
        return self._tokens(after)

    # --- raw text ---------------------------------------------------------------------------------------------------

    def _raw(self, row: Row, prompt: str) -> Prompt:
        """Tokenise context and prompt separately and concatenate them, with a BOS only if the tokenizer adds one."""
        if self.placement not in (None, "prefix"):
            raise DataError(
                f"row {row.id!r} is raw text: context.placement {self.placement!r} needs `messages`; use `prefix`"
            )
        lead = self._lead()
        ids = self._tokens(prompt)
        own = self._tokens(self.context_text)
        self._check_raw_bos(row, "prompt", ids, lead)
        self._check_raw_bos(row, "context", own, lead)
        context = self._context((*lead, *own))
        return Prompt(
            row_id=row.id,
            student_ids=as_ids((*lead, *ids)),
            teacher_ids=as_ids(ids),
            context=context,
            answer=row.answer,
            teacher=row.teacher,
        )

    def _lead(self) -> tuple[int, ...]:
        """Return the special tokens that the tokenizer puts before a text (BOS or none)."""
        plain = self._tokens("a")
        full = tuple(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        raise DataError(
            "the tokenizer changes a text when it adds special tokens: use `messages` instead of `prompt` rows"
        )

    # --- chat -------------------------------------------------------------------------------------------------------

    def _chat(self, row: Row) -> Prompt:
        placement = self.placement or "system"
        if placement == "prefix":
            raise DataError(
                f"row {row.id!r} has messages: context.placement `prefix` is for raw text; "
                "use `system` or `user_prefix`"
            )
        system, turns = self._split(row)
        name = f"row {row.id!r}"
        student_text = self._template(with_system(system, turns), name)
        teacher_text = self._template(self._insert_context(placement, system, turns), name)
        self._check_contents(name, placement, system, turns, student_text, teacher_text)
        student_ids, teacher_ids = self._tokens(student_text), self._tokens(teacher_text)
        self._check_tail(row, turns[-1]["content"], student_text, teacher_text, student_ids, teacher_ids)
        self._check_bos(row, student_ids, teacher_ids)
        prefix = self._prefix(placement, system)
        if teacher_ids[: len(prefix)] != prefix or len(prefix) == len(teacher_ids):
            self.without_shared_prefix.append(row.id)
            prefix = ()
        return Prompt(
            row_id=row.id,
            student_ids=as_ids(student_ids),
            teacher_ids=as_ids(teacher_ids[len(prefix) :]),
            context=self._context(prefix) if prefix else None,
            answer=row.answer,
            teacher=row.teacher,
        )

    def _split(self, row: Row) -> tuple[str | None, Messages]:
        """Return (student's system content, other turns); None leaves the system turn to the template."""
        assert row.messages is not None
        turns = [message.model_dump() for message in row.messages]
        own = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        mode = self.student.system
        if mode != "template" and own is not None:
            raise DataError(
                f"row {row.id!r} has a system message, and student.system is `{mode}`: remove it or use `template`"
            )
        if mode == "none" and self._inserts_system():
            raise DataError(
                "student.system is `none`, but this chat template inserts a system turn: use student.system=text "
                'student.system_text="" for an empty one, or `template` to accept it'
            )
        return (self.student.system_text if mode == "text" else own), turns

    def _insert_context(self, placement: Placement, system: str | None, turns: Messages) -> Messages:
        if placement == "system":
            return with_system(SEPARATOR.join(filter(None, (self.context_text, system))), turns)
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turn = {"role": "user", "content": self.context_text + SEPARATOR + turns[first]["content"]}
        return with_system(system, [*turns[:first], turn, *turns[first + 1 :]])

    def _prefix(self, placement: Placement, system: str | None) -> tuple[int, ...]:
        """Return the longest token prefix that the context's renderings with different user contents share."""
        key = (placement, repr(system))
        if key not in self._prefixes:
            renderings = [
                self._tokens(
                    self._template(
                        self._insert_context(placement, system, [{"role": "user", "content": probe}]), "the context"
                    )
                )
                for probe in _PROBES
            ]
            self._prefixes[key] = common_prefix(renderings)
        return self._prefixes[key]

    def _inserts_system(self) -> bool:
        """Tell whether the template writes a system turn for messages without one."""
        probe, mark = "\u00abuser\u00bb", "\u00absystem\u00bb"
        try:
            whole = self._template([{"role": "system", "content": mark}, {"role": "user", "content": probe}], "a probe")
        except DataError:  # it refuses system turns
            return False
        head = whole.split(mark)[0]
        without = self._template([{"role": "user", "content": probe}], "a probe")
        return without.startswith(head) and not without.startswith(head + probe)

    def _template(self, messages: Messages, name: str) -> str:
        """Render `messages` of the row `name`. Raises DataError, whatever the template raises."""
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{name} has messages, and the tokenizer of {self.student.model} has no chat template: use raw text "
                "(`prompt`), or a chat model"
            )
        date = self.student.template_date
        pinned: dict[str, Any] = {}
        if date != "template":
            pinned = {"date_string": date.strftime("%d %b %Y"), "strftime_now": date.strftime}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    **{**pinned, **self.student.chat_template_kwargs},
                )
            )
        except Exception as error:  # a template is a program of the model's author
            hint = ""
            if messages[0]["role"] == "system":
                hint = "; if it takes no system turn, use context.placement=user_prefix and rows without one"
            raise DataError(f"{name}: the chat template refuses the messages: {one_line(error)}{hint}") from error

    def _check_contents(
        self,
        name: str,
        placement: Placement,
        system: str | None,
        turns: Messages,
        student_text: str,
        teacher_text: str,
    ) -> None:
        """Raise DataError if a template leaves out the context, a system message or a user content, in silence."""
        if self.context_text.strip() not in teacher_text:
            remedy = "try context.placement=user_prefix" if placement == "system" else "try context.placement=system"
            raise DataError(
                f"{name}: the context is nowhere in the teacher's prompt: this chat template leaves out "
                f"{'system turns' if placement == 'system' else 'a part of the user turn'} or changes them; {remedy}"
            )
        said = [("system", system or ""), *((turn["role"], turn["content"]) for turn in turns)]
        for role, content in said:
            if role != "assistant" and not (content.strip() in student_text and content.strip() in teacher_text):
                raise DataError(f"{name}: this chat template leaves out or changes a {role} message: {content[:40]!r}")

    def _check_tail(
        self,
        row: Row,
        content: str,
        student_text: str,
        teacher_text: str,
        student_ids: Sequence[int],
        teacher_ids: Sequence[int],
    ) -> None:
        """Raise DataError unless both sides have equal text and equal tokens from the last user content onward."""
        tail = student_text[max(student_text.rfind(content.strip()), 0) :]
        if content.strip() not in student_text or not teacher_text.endswith(tail):
            raise DataError(
                f"row {row.id!r}: this chat template renders the last user content differently with the context; try "
                "another context.placement"
            )
        after = len(self._tokens(tail[len(content.strip()) :]))
        if after and tuple(student_ids[-after:]) != tuple(teacher_ids[-after:]):
            raise DataError(
                f"row {row.id!r}: the last {after} prompt tokens differ between student and teacher although their "
                "text is equal: the tokenizer merges across the context's end; try another context.placement"
            )

    def _check_bos(self, row: Row, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        for side, ids in (("student", student_ids), ("teacher", teacher_ids)):
            if bos is not None and leading_count(ids, bos) > 1:
                raise DataError(
                    f"row {row.id!r} starts with two BOS tokens on the {side}'s side: remove the one in its text"
                )

    def _check_raw_bos(self, row: Row, name: str, ids: Sequence[int], lead: Sequence[int]) -> None:
        """Raise DataError for a text that begins with the BOS that the tokenizer, or the context, puts before it."""
        bos = self.tokenizer.bos_token_id
        if bos is None or not leading_count(ids, bos) or (name == "context" and not lead):
            return
        why = "the tokenizer adds one as well" if lead else "it would stand between the context and the prompt"
        raise DataError(f"row {row.id!r}: the {name} begins with a BOS token, and {why}: remove it from the text")

    # --- shared -----------------------------------------------------------------------------------------------------

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _context(self, ids: Sequence[int]) -> str | None:
        if not ids:
            return None
        name = context_hash(self._fingerprint, as_ids(ids))
        self.contexts.setdefault(name, Context(hash=name, ids=as_ids(ids)))
        return name


def with_system(system: str | None, turns: Messages) -> Messages:
    """Return `turns` after a system turn; None adds no system turn."""
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest prefix that all `sequences` share."""
    shortest = min(len(sequence) for sequence in sequences)
    first = sequences[0]
    length = next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)
    return tuple(first[:length])


def teacher_sequence(prompt: Prompt, contexts: Mapping[str, Context]) -> list[int]:
    """Return the teacher's whole prompt, context included, for in-context generation."""
    lead: list[int] = [] if prompt.context is None else contexts[prompt.context].ids.tolist()
    return [*lead, *prompt.teacher_ids.tolist()]


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
