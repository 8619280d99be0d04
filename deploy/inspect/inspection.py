"""What student and teacher see of one row, token by token: where mistakes of templates and tokenizers show. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.data.rendering import teacher_sequence
from common.data.token_text import pieces
from common.protocol.schema import Context, Prompt

Role = Literal["context", "prompt", "response"]


@dataclass(frozen=True, slots=True)
class SeenToken:
    """One token: its place on either side (None where that side has not got it), and whether the loss counts it."""

    teacher: int | None
    student: int | None
    role: Role
    id: int
    piece: str
    counted: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """A row as both sides see it: `tokens` in the teacher's order, what the student alone has before what both have."""

    row_id: str
    tokens: Sequence[SeenToken]
    context_tokens: int
    """Of the teacher's prefix that all rows under this context share."""
    teacher_tokens: int
    """Of the teacher's prompt, context included."""
    student_tokens: int
    """Of the student's prompt."""
    equal_tokens: int
    """At the end of both prompts."""
    bos: tuple[int, int] | None
    """BOS tokens in the student's and in the teacher's prompt; None where the tokenizer has none."""

    @property
    def teacher_alone(self) -> Sequence[SeenToken]:
        """Prompt tokens that the student does not see."""
        return [token for token in self.tokens if token.student is None]

    @property
    def student_alone(self) -> Sequence[SeenToken]:
        """Prompt tokens that the teacher does not see."""
        return [token for token in self.tokens if token.teacher is None]

    def warnings(self) -> Iterator[str]:
        """What is suspicious about the row."""
        if not self.equal_tokens:
            yield "the prompts end differently: the answer follows other tokens on either side"
        for side, count in zip(("student", "teacher"), self.bos or (), strict=False):
            if count > 1:
                yield f"{count} BOS tokens on the {side}'s side: the text holds one already"
        if self.bos is not None and min(self.bos) == 0 < max(self.bos):
            yield "one side begins with BOS and the other does not"
        if not self.context_tokens and self.teacher_alone:
            yield "no prefix is shared with other rows, the tokenizer merges across the context's end: no cache for it"
        if not self.teacher_alone:
            yield "the teacher sees nothing that the student does not: there is nothing to distil"


def inspect_row(
    tokenizer: Any, prompt: Prompt, contexts: Mapping[str, Context], response: Sequence[int], skip_first: int = 0
) -> Seen:
    """`prompt` as both sides see it, `response` behind it; the loss skips its first `skip_first` tokens."""
    teacher, student = teacher_sequence(prompt, contexts), prompt.student_ids.tolist()
    context = 0 if prompt.context is None else len(contexts[prompt.context].ids)
    equal = equal_at_end(teacher, student)
    apart, own = len(teacher) - equal, len(student) - equal
    texts, own_texts = pieces(tokenizer, [*teacher, *response]), pieces(tokenizer, [*student, *response])
    tokens: list[SeenToken] = []
    for place, one in enumerate(teacher[:apart]):
        tokens.append(SeenToken(place, None, "context" if place < context else "prompt", one, texts[place], False))
    for place, one in enumerate(student[:own]):
        tokens.append(SeenToken(None, place, "prompt", one, own_texts[place], False))
    for place, one in enumerate(teacher[apart:], start=apart):
        role: Role = "context" if place < context else "prompt"
        tokens.append(SeenToken(place, place - apart + own, role, one, texts[place], False))
    for place, one in enumerate(response):
        behind = len(teacher) + place
        counted = place >= skip_first
        tokens.append(SeenToken(behind, len(student) + place, "response", one, texts[behind], counted))
    bos = tokenizer.bos_token_id
    return Seen(
        row_id=prompt.row_id,
        tokens=tokens,
        context_tokens=context,
        teacher_tokens=len(teacher),
        student_tokens=len(student),
        equal_tokens=equal,
        bos=None if bos is None else (student.count(bos), teacher.count(bos)),
    )


def equal_at_end(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences end in alike."""
    equal = 0
    while equal < min(len(first), len(second)) and first[-1 - equal] == second[-1 - equal]:
        equal += 1
    return equal


def shortened(tokens: Sequence[SeenToken], most: int) -> Iterator[SeenToken | int]:
    """`tokens` in runs of one role and presence; of runs over `most` only both ends, and how many are left out."""
    start = 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and _kind(tokens[end]) == _kind(tokens[start]):
            continue
        run = tokens[start:end]
        half = most // 2
        if len(run) <= most:
            yield from run
        else:
            yield from run[:half]
            yield len(run) - 2 * half
            yield from run[-half:]
        start = end


def _kind(token: SeenToken) -> tuple[Role, bool, bool]:
    return token.role, token.teacher is None, token.student is None
