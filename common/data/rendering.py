"""Rendering of a row into the token sequences of student and teacher. No other code renders prompts.

The student sees the row; the teacher sees the row with the context. From the last user content onward both have the
same tokens, and a response is appended to both as tokens, never as text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from common.config.model import StudentConfig
from common.data.fingerprint import tokenizer_fingerprint
from common.data.rendered_checks import (
    Messages,
    Placement,
    Tools,
    check_bos,
    check_contents,
    check_context,
    check_ends,
    check_raw_bos,
    check_tail,
    missing_end,
)
from common.data.rows import DataError, Message, Row
from common.data.turns import read_turns
from common.error_text import one_line
from common.protocol.schema import Context, Prompt, as_ids, context_hash

SEPARATOR = "\n\n"
"""Text between the context and the rest of its turn."""

_PROBES = ("Alpha", "7", "(z", "\u00e9t\u00e9")
"""User contents that share no first token, so that their renderings share exactly the context's prefix."""

_MARK = "\u00abcontent\u00bb"

MAX_PARENTS = 16
"""Texts before the rows' own contexts that become contexts themselves; the most frequent ones."""
MIN_PARENT_TOKENS = 16
"""A shorter text before a row's own context is computed with it."""


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
    teacher_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template on the teacher's side. Default: the student's."""
    contexts_travel: bool = False
    """Each prompt carries its context, instead of naming one of `contexts`, which then holds parents alone."""
    _fingerprint: str = field(init=False)
    _prefixes: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    _parents: dict[str, Context | None] = field(default_factory=dict)

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

    def follow_up(self, observation: Sequence[Message], tools: Tools = None) -> tuple[int, ...]:
        """Return the tokens between two answers of one conversation: end of the assistant turn, the turns of
        `observation`, head of the next answer. They are the same for student and teacher and for every history.
        """
        turns = [message.as_dict() for message in observation]
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}, *turns]
        _, found, after = self._template(messages, "a game", tools=tools).partition(_MARK)
        if not found:
            raise DataError("this chat template does not render an answer and the user turn after it unchanged")
        check_contents("a game", turns, after, None)
        if not self._template(messages, "a game", teacher=True, tools=tools).endswith(after):
            raise DataError("context.chat_template_kwargs renders the turns of a game differently for the teacher")
        return self._tokens(after)

    def share_parents(self, rows: Iterable[Row], *, at_least: int = 2) -> None:
        """Make contexts of the texts that stand before the own contexts of `at_least` of the `rows`.

        `render` then names such a context as the parent of a row's own, so that a teacher computes it once. At most
        `MAX_PARENTS` texts are remembered.
        """
        keys = Counter(key for row in rows if (key := self._parent_key(row)) is not None)
        for key, count in keys.most_common(MAX_PARENTS):
            if count < at_least or key in self._parents or len(self._parents) == MAX_PARENTS:
                continue
            ids = self._before_own(key)
            parent = self._parents[key] = self._context(ids) if len(ids) >= MIN_PARENT_TOKENS else None
            if parent is not None:
                self.contexts[parent.hash] = parent

    # --- raw text ---------------------------------------------------------------------------------------------------

    def _raw(self, row: Row, prompt: str) -> Prompt:
        """Tokenise context and prompt separately and concatenate them, with a BOS only if the tokenizer adds one."""
        if self.placement not in (None, "prefix"):
            raise DataError(
                f"row {row.id!r} is raw text: context.placement {self.placement!r} needs `messages`; use `prefix`"
            )
        lead = self._lead()
        ids = self._tokens(prompt)
        shared, own = self._tokens(self.context_text), self._tokens(row.context or "")
        check_raw_bos(row, self.tokenizer.bos_token_id, "prompt", ids, lead)
        check_raw_bos(row, self.tokenizer.bos_token_id, "context", shared or own, lead)
        student_ids = (*lead, *ids)
        if not own:
            return self._prompt(row, student_ids, ids, (*lead, *shared)) if shared else _plain(row, student_ids)
        return self._prompt_with_own(row, student_ids, (*lead, *shared, *own, *ids), len(lead) + len(shared) + len(own))

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
        placement = self._chat_placement(row)
        system, turns = self._split(row)
        name = f"row {row.id!r}"
        context = SEPARATOR.join(filter(None, (self.context_text, row.context)))
        messages, theirs = with_system(system, turns), self._teacher_messages(row, placement, context, system, turns)
        student_text = self._template(messages, name, tools=row.tools)
        student_ids = self._tokens(student_text)
        if theirs is None:
            check_contents(name, messages, student_text, row.tools)
            check_bos(row, self.tokenizer.bos_token_id, student_ids, student_ids)
            return _plain(row, student_ids)
        teacher_text = self._template(theirs, name, teacher=True, tools=row.tools)
        check_context(name, placement, context, teacher_text)
        check_contents(name, messages, student_text, row.tools)
        check_contents(name, theirs if row.teacher_messages else messages, teacher_text, row.tools)
        head = self._answer_head(messages, name, tools=row.tools)
        ends_with_user = row.teacher_messages is None and turns[-1]["role"] == "user"
        if not ends_with_user or self.teacher_template_kwargs is not None:
            teacher_head = self._answer_head(theirs, name, teacher=True, tools=row.tools)
            teacher_text += missing_end(name, head, teacher_head)
        if ends_with_user:
            check_tail(row, turns[-1]["content"], student_text, teacher_text)
        if not row.has_own_context:
            teacher_ids = self._tokens(teacher_text)
            check_ends(row, len(self._tokens(head)), student_ids, teacher_ids)
            check_bos(row, self.tokenizer.bos_token_id, student_ids, teacher_ids)
            prefix = self._prefix(placement, system, row.tools)
            if teacher_ids[: len(prefix)] != prefix or len(prefix) == len(teacher_ids):
                self.without_shared_prefix.append(row.id)
                prefix = ()
            return self._prompt(row, student_ids, teacher_ids[len(prefix) :], prefix)
        boundary = len(teacher_text) - len(head)
        if row.teacher_messages is None:
            boundary = teacher_text.find(context.strip()) + len(context.strip())
        teacher_ids, own_tokens = self._tokens_up_to(teacher_text, boundary)
        check_ends(row, len(self._tokens(head)), student_ids, teacher_ids)
        check_bos(row, self.tokenizer.bos_token_id, student_ids, teacher_ids)
        return self._prompt_with_own(row, student_ids, teacher_ids, min(own_tokens, len(teacher_ids) - 1))

    def _chat_placement(self, row: Row) -> Placement:
        placement = self.placement or "system"
        if placement == "prefix":
            raise DataError(
                f"row {row.id!r} has messages: context.placement `prefix` is for raw text; "
                "use `system`, `user_prefix` or `turns`"
            )
        return placement

    def _teacher_messages(
        self, row: Row, placement: Placement, context: str, system: str | None, turns: Messages
    ) -> Messages | None:
        """Return the teacher's chat; None if it is the student's."""
        if row.teacher_messages is None:
            return self._insert_context(placement, context, system, turns) if context else None
        turns = [message.as_dict() for message in row.teacher_messages]
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
        return self._insert_context(placement, context, system, turns) if context else with_system(system, turns)

    def _parent_key(self, row: Row) -> str | None:
        """Identify the text before the row's own context; None without an own context."""
        if not row.has_own_context:
            return None
        if row.messages is None:
            return json.dumps(["raw" if row.prompt is not None else "game", None, None])
        if row.teacher_messages is not None:
            first = row.teacher_messages[0]
            return json.dumps(["chat", first.content if first.role == "system" else None, row.tools])
        if self._chat_placement(row) == "system":
            return json.dumps(["system", None, row.tools])
        return json.dumps(["user", self._split(row)[0], row.tools])

    def _before_own(self, key: str) -> tuple[int, ...]:
        """Return the tokens that stand before every own context of the kind `key`."""
        kind, system, tools = json.loads(key)
        if kind == "raw":
            return (*self._lead(), *self._tokens(self.context_text)) if self.context_text else ()
        placement: Placement = "user_prefix" if kind == "user" else self.placement or "system"
        renderings = []
        for probe in _PROBES:
            turn: Messages = [{"role": "user", "content": probe}]
            if kind != "chat":
                probe = SEPARATOR.join(filter(None, (self.context_text, probe)))
                messages = self._insert_context(placement, probe, system, [{"role": "user", "content": "-"}])
            elif self.context_text:
                messages = self._insert_context(placement, self.context_text, system, turn)
            else:
                messages = with_system(system, turn)
            renderings.append(self._tokens(self._template(messages, "the context", teacher=True, tools=tools)))
        return common_prefix(renderings)

    def _split(self, row: Row) -> tuple[str | None, Messages]:
        """Return (student's system content, other turns); None leaves the system turn to the template."""
        assert row.messages is not None
        turns = [message.as_dict() for message in row.messages]
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

    @staticmethod
    def _insert_context(placement: Placement, context: str, system: str | None, turns: Messages) -> Messages:
        if placement == "system":
            return with_system(SEPARATOR.join(filter(None, (context, system))), turns)
        if placement == "turns":
            before = [turn.as_dict() for turn in read_turns(context)]
            lead = before.pop(0)["content"] if before[0]["role"] == "system" else None
            both = None if lead is system is None else SEPARATOR.join(filter(None, (lead, system)))
            return with_system(both, [*before, *turns])
        first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
        turn = {"role": "user", "content": context + SEPARATOR + turns[first]["content"]}
        return with_system(system, [*turns[:first], turn, *turns[first + 1 :]])

    def _prefix(self, placement: Placement, system: str | None, tools: Tools) -> tuple[int, ...]:
        """Return the longest token prefix that the context's renderings with different user contents share."""
        key = (placement, repr((system, tools)))
        if key not in self._prefixes:
            renderings = [
                self._tokens(
                    self._template(
                        self._insert_context(
                            placement, self.context_text, system, [{"role": "user", "content": probe}]
                        ),
                        "the context",
                        teacher=True,
                        tools=tools,
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

    def _answer_head(self, messages: Messages, name: str, *, teacher: bool = False, tools: Tools = None) -> str:
        """Return the text between the last message's content and the answer."""
        marked = [*messages[:-1], {**messages[-1], "content": _MARK}]
        _, found, after = self._template(marked, name, teacher=teacher, tools=tools).rpartition(_MARK)
        if not found:
            raise DataError(f"{name}: this chat template leaves out or changes the last message")
        return after

    def _template(self, messages: Messages, name: str, *, teacher: bool = False, tools: Tools = None) -> str:
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
        arguments = self.student.chat_template_kwargs
        if teacher and self.teacher_template_kwargs is not None:
            arguments = self.teacher_template_kwargs
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=None if tools is None else list(tools),
                    tokenize=False,
                    add_generation_prompt=True,
                    **{**pinned, **arguments},
                )
            )
        except Exception as error:  # a template is a program of the model's author
            hint = ""
            if messages[0]["role"] == "system":
                hint = "; if it takes no system turn, use context.placement=user_prefix and rows without one"
            raise DataError(f"{name}: the chat template refuses the messages: {one_line(error)}{hint}") from error

    # --- shared -----------------------------------------------------------------------------------------------------

    def _prompt(
        self, row: Row, student_ids: Sequence[int], teacher_ids: Sequence[int], prefix: Sequence[int]
    ) -> Prompt:
        """The prompt under a context for many rows, whose tokens are `prefix`."""
        context = self._context(prefix) if prefix else None
        return Prompt(
            row_id=row.id,
            student_ids=as_ids(student_ids),
            teacher_ids=as_ids(teacher_ids),
            context=None if context is None else context.hash,
            answer=row.answer,
            teacher=row.teacher,
            own_context=context if self.contexts_travel else None,
        )

    def _prompt_with_own(
        self, row: Row, student_ids: Sequence[int], teacher_ids: Sequence[int], own_tokens: int
    ) -> Prompt:
        """The prompt under the row's own context: the first `own_tokens` of the teacher's whole prompt."""
        ids = as_ids(teacher_ids[:own_tokens])
        parent = self._parents.get(str(self._parent_key(row))) if self._parents else None
        if parent is not None and (len(parent.ids) >= len(ids) or not (ids[: len(parent.ids)] == parent.ids).all()):
            parent = None
        own = Context(context_hash(self._fingerprint, ids), ids, None if parent is None else parent.hash)
        return Prompt(
            row_id=row.id,
            student_ids=as_ids(student_ids),
            teacher_ids=as_ids(teacher_ids[own_tokens:]),
            context=own.hash,
            answer=row.answer,
            teacher=row.teacher,
            context_id=own_context_id(row),
            own_context=own,
        )

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens_up_to(self, text: str, boundary: int) -> tuple[tuple[int, ...], int]:
        """Return the tokens of `text`, and how many of them end at or before the character `boundary`."""
        if not self.tokenizer.is_fast:
            whole, part = self._tokens(text), self._tokens(text[:boundary])
            return whole, len(common_prefix([whole, part]))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        count = next((index for index, end in enumerate(ends) if end > boundary), len(ends))
        return tuple(encoded["input_ids"]), count

    def _context(self, ids: Sequence[int]) -> Context:
        context = Context(context_hash(self._fingerprint, as_ids(ids)), as_ids(ids))
        return context if self.contexts_travel else self.contexts.setdefault(context.hash, context)


def _plain(row: Row, ids: Sequence[int]) -> Prompt:
    """The prompt of a row without a context: the teacher sees what the student sees."""
    return Prompt(row.id, as_ids(ids), as_ids(ids), None, answer=row.answer, teacher=row.teacher)


def own_context_id(row: Row) -> str:
    """16 hex digits of the sha256 of the row's own context, as text or messages."""
    messages = row.teacher_messages
    own = row.context if messages is None else json.dumps([message.as_dict() for message in messages])
    return hashlib.sha256(str(own).encode()).hexdigest()[:16]


def with_system(system: str | None, turns: Messages) -> Messages:
    """Return `turns` after a system turn; None adds no system turn."""
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest prefix that all `sequences` share."""
    shortest = min(len(sequence) for sequence in sequences)
    first = sequences[0]
    length = next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)
    return tuple(first[:length])


def context_of(prompt: Prompt, contexts: Mapping[str, Context]) -> Context | None:
    """Return the prompt's context: its own, or one of `contexts`."""
    if prompt.own_context is not None or prompt.context is None:
        return prompt.own_context
    return contexts[prompt.context]


def teacher_sequence(prompt: Prompt, contexts: Mapping[str, Context]) -> list[int]:
    """Return the teacher's whole prompt, context included, for in-context generation."""
    context = context_of(prompt, contexts)
    return [*([] if context is None else context.ids.tolist()), *prompt.teacher_ids.tolist()]
