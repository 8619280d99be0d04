"""One row as the student and the teacher see it, token by token: shows mistakes of templates and tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.data.rendering import common_prefix, context_of, teacher_sequence
from common.data.special_tokens import leading_count
from common.data.token_text import token_texts
from common.protocol.schema import Context, Prompt

Role = Literal["context", "prompt", "response"]


@dataclass(frozen=True, slots=True)
class InspectedToken:
    """One token. `teacher` and `student` are its positions on the two sides, None on a side that lacks the token.

    The role of the teacher's own tokens is `context`, that of the others `prompt` or `response`.
    """

    teacher: int | None
    student: int | None
    role: Role
    id: int
    piece: str
    counted: bool
    """The loss includes this token."""


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """A row as both sides see it. `tokens`: the common start, the teacher's own, the student's own, the common end."""

    row_id: str
    tokens: Sequence[InspectedToken]
    own_context: bool
    """True if the teacher's prefix is of this row alone."""
    context_tokens: int
    """Length of the teacher's prefix that it computes once: that of all rows under this context, or of this row."""
    teacher_tokens: int
    """Length of the teacher's prompt, context included."""
    student_tokens: int
    """Length of the student's prompt."""
    equal_tokens: int
    """Length of the common end of both prompts."""
    bos: tuple[int, int] | None
    """Number of BOS tokens at the start of the student's and the teacher's prompt; None without a BOS token."""
    control_token: str | None = None
    """First special token whose text stands in a message of the row."""

    def warnings(self) -> Iterator[str]:
        """Yield a line for each likely mistake."""
        if not self.equal_tokens:
            yield "the prompts end differently: the answer follows different tokens on the two sides"
        for side, count in zip(("student", "teacher"), self.bos or (), strict=False):
            if count > 1:
                yield f"{count} BOS tokens on the {side}'s side: the text already holds one"
        if self.bos is not None and min(self.bos) == 0 < max(self.bos):
            yield "one side begins with BOS and the other does not"
        if self.control_token is not None:
            yield f"the row's text holds {self.control_token!r}, which becomes a control token on both sides"
        teacher_only = self.teacher_tokens - self.equal_tokens
        if not self.context_tokens and teacher_only:
            yield "no prefix is shared with other rows, so the teacher caches none: a token spans the context's end"
        if not teacher_only:
            yield "the teacher sees nothing that the student does not: there is nothing to distil"


def inspect_row(
    tokenizer: Any, prompt: Prompt, contexts: Mapping[str, Context], response: Sequence[int], skip_first: int = 0
) -> InspectedRow:
    """Compare both sides of `prompt`, followed by `response`; the loss skips the first `skip_first` response tokens."""
    teacher, student = teacher_sequence(prompt, contexts), prompt.student_ids.tolist()
    context = context_of(prompt, contexts)
    equal = equal_at_end(teacher, student)
    teacher_only, student_only = len(teacher) - equal, len(student) - equal
    head = len(common_prefix([teacher[:teacher_only], student[:student_only]]))
    teacher_ids = [*teacher, *response]
    texts = token_texts(tokenizer, teacher_ids)
    student_texts = token_texts(tokenizer, [*student, *response])

    tokens = [InspectedToken(i, i, "prompt", teacher[i], texts[i], False) for i in range(head)]
    tokens += [InspectedToken(i, None, "context", teacher[i], texts[i], False) for i in range(head, teacher_only)]
    tokens += [
        InspectedToken(None, i, "prompt", student[i], student_texts[i], False) for i in range(head, student_only)
    ]
    for i in range(teacher_only, len(teacher_ids)):
        on_student = i - teacher_only + student_only
        counted = i >= len(teacher) + skip_first
        role: Role = "prompt" if i < len(teacher) else "response"
        tokens.append(InspectedToken(i, on_student, role, teacher_ids[i], texts[i], counted))
    bos = tokenizer.bos_token_id
    return InspectedRow(
        row_id=prompt.row_id,
        tokens=tokens,
        own_context=prompt.own_context is not None,
        context_tokens=0 if context is None else len(context.ids),
        teacher_tokens=len(teacher),
        student_tokens=len(student),
        equal_tokens=equal,
        bos=None if bos is None else (leading_count(student, bos), leading_count(teacher, bos)),
    )


def equal_at_end(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common suffix."""
    equal = 0
    while equal < min(len(first), len(second)) and first[-1 - equal] == second[-1 - equal]:
        equal += 1
    return equal


def shortened(tokens: Sequence[InspectedToken], max_tokens: int) -> Iterator[InspectedToken | int]:
    """Yield `tokens`; of a group (same role, same sides) over `max_tokens`, both ends and the number left out."""
    start = 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and _kind(tokens[end]) == _kind(tokens[start]):
            continue
        group = tokens[start:end]
        half = max_tokens // 2
        if len(group) <= max_tokens:
            yield from group
        else:
            yield from group[:half]
            yield len(group) - 2 * half
            yield from group[-half:]
        start = end


def _kind(token: InspectedToken) -> tuple[Role, bool, bool]:
    return token.role, token.teacher is None, token.student is None
