"""Answers token by token: the student's log-probs against the teacher's, and the tokens with the most KL."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.report.charts import Series, line_chart
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import MISSING, fixed, spaced
from deploy.report.parts import Column, Figure, Table, View

MAX_SAMPLES = 8
MAX_TOKENS = 400
"""Tokens shown of one answer."""
MAX_CONTEXT = 6000
"""Characters shown of a context, from both its ends."""
HARDEST = 6
"""Tokens with the most KL, in the table of an answer."""

LEVELS = (0.05, 0.2, 0.5, 1.0)
"""KL in nats at which a token gets the next stronger mark; the classes are k0 to k4."""

COLUMNS = (
    Column("token", True),
    Column("text", code=True),
    Column("student", True),
    Column("teacher", True),
    Column("KL", True),
    Column("student’s top", code=True),
    Column("teacher’s top", code=True),
)


@dataclass(frozen=True, slots=True)
class Token:
    """One response token. `student` and `teacher` are its log-probs; the top lists hold (text, log-prob), best first.
    A token with `counted` false is not in the loss.
    """

    position: int
    text: str
    student: float
    teacher: float
    kl: float
    counted: bool
    student_top: Sequence[tuple[str, float]]
    teacher_top: Sequence[tuple[str, float]]

    @property
    def shown(self) -> str:
        """The text with visible line ends and tabs; a dot for an empty text."""
        return self.text.replace("\n", "⏎\n").replace("\t", "⇥\t") or "·"

    @property
    def mark(self) -> str:
        """The CSS class of the token's KL."""
        return f"k{level(self.kl)}" if self.counted else "skipped"

    @property
    def row(self) -> list[Any]:
        """Cells of `COLUMNS`."""
        return [
            self.position + 1,
            _quoted(self.text),
            fixed(self.student, 2),
            fixed(self.teacher, 2),
            fixed(self.kl, 3),
            _listed(self.student_top),
            _listed(self.teacher_top),
        ]

    @property
    def description(self) -> str:
        """All values in one line."""
        position, text, student, teacher, kl, student_top, teacher_top = self.row
        skipped = "" if self.counted else " · not in the loss"
        return (
            f"{position}: {text} · student {student} · teacher {teacher} · KL {kl} nats{skipped} · "
            f"student’s top: {student_top} · teacher’s top: {teacher_top}"
        )


def tokens_of(record: Record) -> list[Token]:
    """The tokens of a line of ``tokens.jsonl``, up to the end of its shortest column."""
    names = ("pieces", "student_logprobs", "teacher_logprobs", "kl", "counted", "student_top", "teacher_top")
    columns = [found if isinstance(found := record.get(name), list) else [] for name in names]
    return [
        Token(index, str(text), _float(student), _float(teacher), _float(kl), bool(counted), _top(first), _top(second))
        for index, (text, student, teacher, kl, counted, first, second) in enumerate(zip(*columns, strict=False))
    ]


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _top(value: object) -> list[tuple[str, float]]:
    pairs = value if isinstance(value, list) else []
    return [(str(pair[0]), _float(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _listed(top: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{_quoted(text)} {100 * math.exp(min(logprob, 0.0)):.0f} %" for text, logprob in top) or MISSING


def level(kl: float) -> int:
    """The strength of a token's mark, 0 to 4."""
    return sum(kl >= edge for edge in LEVELS)


def tokens_view(run: RunData) -> View:
    """Up to `MAX_SAMPLES` answers, spread over the steps, the last steps first."""
    records = [record for record in run.tokens if tokens_of(record)]
    chosen = [records[index] for index in reversed(spaced(len(records), MAX_SAMPLES))]
    edges = ["below 0.05", "0.05", "0.2", "0.5", "1 and more"]
    return {
        "levels": [(f"tok k{index}", f"{edge} nats") for index, edge in enumerate(edges)],
        "samples": [_sample(run, record) for record in chosen],
    }


def _sample(run: RunData, record: Record) -> View:
    everything = tokens_of(record)
    tokens = everything[:MAX_TOKENS]
    counted = [token for token in everything if token.counted and math.isfinite(token.kl)]
    hardest = sorted(counted, key=lambda token: -token.kl)[:HARDEST]
    title = f"Step {record.get('step', '?')}, row {record.get('row', '?')}"
    total = record.get("response_tokens", len(everything))
    mean = sum(token.kl for token in counted) / len(counted) if counted else None
    return {
        "title": title,
        "facts": [
            ("Mean KL", f"{fixed(mean, 3)} nats"),
            ("Tokens", f"{total}" if total == len(tokens) else f"{total}, the first {len(tokens)} shown"),
            ("Finish reason", str(record.get("finish_reason", MISSING))),
            *([("Teacher", str(record["teacher"]))] if record.get("teacher") else []),
        ],
        "context": _context(run, record.get("context")),
        "student_start": str(record.get("student_start", "")),
        "prompt": str(record.get("prompt", MISSING)),
        "tokens": tokens,
        "logprobs": _logprobs(title, tokens),
        "hardest": Table(f"Tokens of {title} with the most KL", COLUMNS, [token.row for token in hardest]),
    }


def _context(run: RunData, name: object) -> str:
    if name is None:
        return "(none)"
    text = run.contexts.get(str(name))
    if text is None:
        return f"(the run kept no text of {name})"
    left_out = len(text) - MAX_CONTEXT
    half = MAX_CONTEXT // 2
    return text if left_out <= 0 else f"{text[:half]}\n… [{left_out:,} characters left out] …\n{text[-half:]}"


def _logprobs(title: str, tokens: Sequence[Token]) -> Figure:
    series = [
        Series("student", "student", [(token.position + 1.0, token.student) for token in tokens]),
        Series("teacher", "teacher", [(token.position + 1.0, token.teacher) for token in tokens]),
    ]
    label = f"Log-probs of the tokens of {title}, student and teacher"
    return Figure(
        "Log-probs",
        line_chart(label, series, x_label="token", height=170),
        Table(f"All tokens of {title}: log-probs and KL in nats", COLUMNS, [token.row for token in tokens]),
        legend=[("student", "student"), ("teacher", "teacher, with the context")],
    )
