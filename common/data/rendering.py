"""From one row to the token sequences of both sides: the only renderer, so student and teacher cannot drift apart.

The student sees the row; the teacher sees the row with the context. From the last user content onward both are the
same tokens, and the response is appended to either as tokens, never as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.config.model import ConfigError, StudentConfig
from common.data.fingerprint import tokenizer_fingerprint
from common.data.rows import DataError, Row
from common.protocol.schema import Context, Prompt, as_ids, context_hash

Placement = Literal["prefix", "system", "user_prefix"]
Messages = list[dict[str, str]]

SEPARATOR = "\n\n"
"""Between the context and what follows it inside one turn."""

_PROBES = ("Alpha", "7", "(z", "\u00e9t\u00e9")
"""User contents that share no first token: what their renderings have in common is the context's own prefix."""


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a Hugging Face folder or hub name. Raises ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise ConfigError(
            f"no tokenizer at {model}: no model's folder (seen from {Path.cwd()}), and no hub name that can be fetched "
            f"here: {str(error).splitlines()[0]}"
        ) from error


@dataclass
class Renderer:
    """Renders rows; collects the contexts (token prefixes) that the rendered prompts name.

    Raises DataError, naming the row, for what cannot be rendered as the configuration asks.
    """

    tokenizer: Any
    context_text: str
    student: StudentConfig
    placement: Placement | None = None
    contexts: dict[str, Context] = field(default_factory=dict)
    without_shared_prefix: list[str] = field(default_factory=list)
    """Rows whose first user token merges with the context's last: scored right, but without the context's cache."""
    _fingerprint: str = field(init=False)
    _prefixes: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fingerprint = tokenizer_fingerprint(self.tokenizer)

    def render(self, row: Row) -> Prompt:
        """Student and teacher tokens of one row."""
        if row.prompt is not None:
            return self._raw(row, row.prompt)
        return self._chat(row)

    def under(self, context_text: str) -> Renderer:
        """A renderer of another context, with this one's tokenizer; the contexts it names are collected here too."""
        other = copy(self)
        other.context_text, other._prefixes = context_text, {}
        return other

    def follow_up(self, observation: str) -> tuple[int, ...]:
        """Tokens between one answer and the next of the same conversation: the end of the assistant's turn, a user turn
        of `observation`, the head of the answer. Equal on both sides, whatever stands before.
        """
        mark = "\u00abanswer\u00bb"
        roles = (("user", "question"), ("assistant", mark), ("user", observation))
        text = self._template([{"role": role, "content": content} for role, content in roles])
        _, found, after = text.partition(mark)
        if not found or observation.strip() not in after:
            raise DataError("this chat template does not render an answer and a user turn behind it as they are")
        return self._tokens(after)

    # --- raw text ---------------------------------------------------------------------------------------------------

    def _raw(self, row: Row, prompt: str) -> Prompt:
        """Context and prompt are tokenised apart and concatenated; a BOS only where the tokenizer adds one."""
        if self.placement not in (None, "prefix"):
            raise DataError(
                f"row {row.id!r} is raw text: context.placement {self.placement!r} needs `messages`; use `prefix`"
            )
        lead = self._lead()
        ids = self._tokens(prompt)
        context = self._context((*lead, *self._tokens(self.context_text)))
        return Prompt(
            row_id=row.id,
            student_ids=as_ids((*lead, *ids)),
            teacher_ids=as_ids(ids),
            context=context,
            answer=row.answer,
            teacher=row.teacher,
        )

    def _lead(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer itself puts ahead of a text (BOS or nothing)."""
        plain = self._tokens("a")
        full = tuple(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        raise DataError("the tokenizer changes a text when it adds special tokens; raw rows cannot be rendered with it")

    # --- chat -------------------------------------------------------------------------------------------------------

    def _chat(self, row: Row) -> Prompt:
        placement = self.placement or "system"
        if placement == "prefix":
            raise DataError(
                f"row {row.id!r} has messages: context.placement `prefix` is for raw text; "
                "use `system` or `user_prefix`"
            )
        system, turns = self._split(row)
        student_text = self._template(with_system(system, turns))
        teacher_text = self._template(self._with_context(placement, system, turns))
        student_ids, teacher_ids = self._tokens(student_text), self._tokens(teacher_text)
        self._check_tail(row, turns[-1]["content"], student_text, teacher_text, student_ids, teacher_ids)
        self._check_bos(row, student_ids)
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
        """(system content of the student or None for the template's own choice, the other turns)."""
        assert row.messages is not None
        turns = [message.model_dump() for message in row.messages]
        own = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        mode = self.student.system
        if mode != "template" and own is not None:
            raise DataError(f"row {row.id!r} has a system message of its own, and student.system is `{mode}`")
        if mode == "none" and self._inserts_system():
            raise DataError(
                "student.system is `none`, but this chat template inserts a system turn of its own; "
                'use student.system=text student.system_text="" for an empty one, or `template` to accept it'
            )
        return (self.student.system_text if mode == "text" else own), turns

    def _with_context(self, placement: Placement, system: str | None, turns: Messages) -> Messages:
        if placement == "system":
            return with_system(SEPARATOR.join(filter(None, (self.context_text, system))), turns)
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turn = {"role": "user", "content": self.context_text + SEPARATOR + turns[first]["content"]}
        return with_system(system, [*turns[:first], turn, *turns[first + 1 :]])

    def _prefix(self, placement: Placement, system: str | None) -> tuple[int, ...]:
        """Longest common token prefix of the context's renderings with different user contents."""
        key = (placement, repr(system))
        if key not in self._prefixes:
            renderings = [
                self._tokens(
                    self._template(self._with_context(placement, system, [{"role": "user", "content": probe}]))
                )
                for probe in _PROBES
            ]
            self._prefixes[key] = common_prefix(renderings)
        return self._prefixes[key]

    def _inserts_system(self) -> bool:
        """Whether the template writes a system turn when it is given none."""
        probe, mark = "\u00abuser\u00bb", "\u00absystem\u00bb"
        head = self._template([{"role": "system", "content": mark}, {"role": "user", "content": probe}]).split(mark)[0]
        without = self._template([{"role": "user", "content": probe}])
        return without.startswith(head) and not without.startswith(head + probe)

    def _template(self, messages: Messages) -> str:
        date = self.student.template_date
        pinned: dict[str, Any] = {"date_string": date.strftime("%d %b %Y"), "strftime_now": date.strftime}
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **{**pinned, **self.student.chat_template_kwargs}
            )
        )

    def _check_tail(
        self,
        row: Row,
        content: str,
        student_text: str,
        teacher_text: str,
        student_ids: Sequence[int],
        teacher_ids: Sequence[int],
    ) -> None:
        """From the last user content onward both sides must be the same text and the same tokens."""
        tail = student_text[max(student_text.rfind(content.strip()), 0) :]
        if content.strip() not in student_text or not teacher_text.endswith(tail):
            raise DataError(
                f"row {row.id!r}: this chat template does not render the last user content the same with and without "
                "the context; try another context.placement"
            )
        after = len(self._tokens(tail[len(content.strip()) :]))
        if after and tuple(student_ids[-after:]) != tuple(teacher_ids[-after:]):
            raise DataError(
                f"row {row.id!r}: the last {after} prompt tokens differ between student and teacher although their "
                "text is the same; the tokenizer merges across the context's end: try another context.placement"
            )

    def _check_bos(self, row: Row, ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise DataError(f"row {row.id!r} starts with two BOS tokens: the content already holds one")

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
    """`turns` behind a system turn; None adds none."""
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest run of ids that all `sequences` start with."""
    shortest = min(len(sequence) for sequence in sequences)
    first = sequences[0]
    length = next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)
    return tuple(first[:length])


def teacher_sequence(prompt: Prompt, contexts: Mapping[str, Context]) -> list[int]:
    """The teacher's whole prompt, context included: what in-context generation starts from."""
    lead: list[int] = [] if prompt.context is None else contexts[prompt.context].ids.tolist()
    return [*lead, *prompt.teacher_ids.tolist()]


def check_lengths(
    side: Literal["student", "teacher"], prompt_tokens: Mapping[str, int], *, max_tokens: int, limit: int
) -> None:
    """Raise DataError naming every row (the first 20) whose prompt and longest answer exceed what `side` can take.

    `prompt_tokens` are by row id, the context counted in on the teacher's side.
    """
    faults = [
        f"row {row!r}: {tokens + max_tokens} tokens on the {side}'s side ({tokens} of prompt, {max_tokens} of answer), "
        f"at most {limit}: shorten it, lower rollout.max_tokens or raise {side}.max_sequence_tokens"
        for row, tokens in prompt_tokens.items()
        if tokens + max_tokens > limit
    ]
    if faults:
        more = [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
        raise DataError("\n".join(faults[:20] + more))
