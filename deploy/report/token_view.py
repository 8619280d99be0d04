"""Answers token by token: the student's log-prob against the teacher's, and where they disagree most."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.report.charts import Series, line_chart
from deploy.report.html import Child, Html, tag
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import fixed, spaced
from deploy.report.parts import Column, facts, figure, legend, scroller, section, table

MOST_SAMPLES = 8
MOST_TOKENS = 400
"""Of one answer that are shown."""
MOST_CONTEXT = 6000
"""Characters of a context, from both its ends."""
HARDEST = 6
"""Tokens with the most KL, in the table of an answer."""

LEVELS = (0.05, 0.2, 0.5, 1.0)
"""Nats from which on a token is marked more strongly; the classes are k0 to k4."""


@dataclass(frozen=True, slots=True)
class Token:
    """One response token. ``student`` and ``teacher`` are log-probs; the ``_top`` are (piece, log-prob), best first."""

    position: int
    piece: str
    student: float
    teacher: float
    kl: float
    counted: bool
    student_top: Sequence[tuple[str, float]]
    teacher_top: Sequence[tuple[str, float]]


def tokens_of(record: Record) -> list[Token]:
    """The tokens of a line of ``tokens.jsonl``; as many as every column has."""
    names = ("pieces", "student_logprobs", "teacher_logprobs", "kl", "counted", "student_top", "teacher_top")
    columns = [found if isinstance(found := record.get(name), list) else [] for name in names]
    return [
        Token(index, str(piece), _float(student), _float(teacher), _float(kl), bool(counted), _top(first), _top(second))
        for index, (piece, student, teacher, kl, counted, first, second) in enumerate(zip(*columns, strict=False))
    ]


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _top(value: object) -> list[tuple[str, float]]:
    pairs = value if isinstance(value, list) else []
    return [(str(pair[0]), _float(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]


def level(kl: float) -> int:
    """How strongly a token is marked, 0 to 4."""
    return sum(kl >= edge for edge in LEVELS)


def shown(piece: str) -> str:
    """A piece as text on a page: line ends and tabs are seen, and a token without text of its own is too."""
    return piece.replace("\n", "⏎\n").replace("\t", "⇥\t") or "·"


def chosen(records: Sequence[Record]) -> list[Record]:
    """At most `MOST_SAMPLES`, spread over the steps, the last steps first."""
    whole = [record for record in records if tokens_of(record)]
    return [whole[index] for index in reversed(spaced(len(whole), MOST_SAMPLES))]


def tokens_section(run: RunData) -> Html:
    """Every chosen answer."""
    records = chosen(run.tokens)
    if not records:
        return section(
            "tokens",
            "Token by token",
            tag(
                "p",
                "This run kept no tokens (run.token_samples says how many answers of a step it keeps).",
                class_="none",
            ),
        )
    edges = ["below 0.05", "0.05", "0.2", "0.5", "1 and more"]
    return section(
        "tokens",
        "Token by token",
        legend([(f"tok k{index}", f"{edge} nats") for index, edge in enumerate(edges)]),
        [_sample(run, record, index) for index, record in enumerate(records)],
        lead=(
            "A few answers of some steps, as they were trained on. Marked by the KL at each token: "
            "where the context would have made the model say something else. Arrow keys walk through the tokens."
        ),
    )


def _sample(run: RunData, record: Record, index: int) -> Html:
    everything = tokens_of(record)
    tokens = everything[:MOST_TOKENS]
    counted = [token.kl for token in everything if token.counted and math.isfinite(token.kl)]
    title = f"Step {record.get('step', '?')}, row {record.get('row', '?')}"
    total = record.get("response_tokens", len(everything))
    context = record.get("context")
    return tag(
        "article",
        tag("h3", title, id=f"sample-{index}"),
        facts(
            [
                ("Mean KL", f"{fixed(sum(counted) / len(counted) if counted else None, 3)} nats"),
                ("Tokens", f"{total}" if total == len(tokens) else f"{total}, the first {len(tokens)} shown"),
                ("Ended by", str(record.get("finish_reason", "–"))),
                *([("Teacher", str(record["teacher"]))] if record.get("teacher") else []),
            ]
        ),
        tag(
            "div",
            tag(
                "div",
                tag("h4", "Context (the teacher alone)"),
                _text(f"Context of {title}", _context(run, context)),
                tag("h4", "Prompt (both)"),
                _text(f"Prompt of {title}", str(record.get("prompt", "–"))),
            ),
            tag(
                "div",
                tag("h4", "Answer, as trained on"),
                tag("div", list(_spans(tokens)), class_="tokens", role="group", aria_label=f"Tokens of {title}"),
                tag("p", class_="readout", aria_live="polite"),
                figure("Log-probs", _chart(title, tokens), _all(title, tokens), keys=_keys()),
            ),
            class_="split",
        ),
        _hardest(title, everything),
        class_="sample",
        aria_labelledby=f"sample-{index}",
    )


def _context(run: RunData, name: object) -> str:
    if name is None:
        return "(none)"
    text = run.contexts.get(str(name))
    if text is None:
        return f"(its text was not kept: {name})"
    left_out = len(text) - MOST_CONTEXT
    half = MOST_CONTEXT // 2
    return text if left_out <= 0 else f"{text[:half]}\n… [{left_out:,} characters left out] …\n{text[-half:]}"


def _text(label: str, text: str) -> Html:
    return scroller(label, tag("pre", text))


def _spans(tokens: Sequence[Token]) -> Iterator[Html]:
    for token in tokens:
        marks = "tok " + (f"k{level(token.kl)}" if token.counted else "skipped")
        yield tag(
            "span",
            shown(token.piece),
            class_=marks,
            tabindex=0 if token.position == 0 else -1,
            title=told(token),
            data_told=told(token),
        )


def told(token: Token) -> str:
    """Everything about a token in one line."""
    skipped = "" if token.counted else " · not in the loss"
    return (
        f"{token.position + 1}: {json.dumps(token.piece, ensure_ascii=False)} · student {fixed(token.student, 2)} · "
        f"teacher {fixed(token.teacher, 2)} · KL {fixed(token.kl, 3)} nats{skipped} · "
        f"student’s first: {_listed(token.student_top)} · teacher’s first: {_listed(token.teacher_top)}"
    )


def _listed(top: Sequence[tuple[str, float]]) -> str:
    return (
        ", ".join(
            f"{json.dumps(piece, ensure_ascii=False)} {100 * math.exp(min(logprob, 0.0)):.0f} %"
            for piece, logprob in top
        )
        or "–"
    )


def _keys() -> Html:
    return legend([("student", "student"), ("teacher", "teacher, with the context")])


def _chart(title: str, tokens: Sequence[Token]) -> Html:
    return line_chart(
        f"Log-probs of the tokens of {title}, student and teacher",
        [
            Series("student", "student", [(token.position + 1.0, token.student) for token in tokens]),
            Series("teacher", "teacher", [(token.position + 1.0, token.teacher) for token in tokens]),
        ],
        x_label="token",
        height=170,
    )


COLUMNS = (
    Column("token", True),
    Column("piece", code=True),
    Column("student", True),
    Column("teacher", True),
    Column("KL", True),
    Column("student’s first", code=True),
    Column("teacher’s first", code=True),
)


def _row(token: Token) -> list[Child]:
    return [
        token.position + 1,
        json.dumps(token.piece, ensure_ascii=False),
        fixed(token.student, 2),
        fixed(token.teacher, 2),
        fixed(token.kl, 3),
        _listed(token.student_top),
        _listed(token.teacher_top),
    ]


def _all(title: str, tokens: Sequence[Token]) -> Html:
    return table(f"All tokens of {title}: log-probs and KL in nats", COLUMNS, [_row(token) for token in tokens])


def _hardest(title: str, tokens: Sequence[Token]) -> Html:
    counted = [token for token in tokens if token.counted and math.isfinite(token.kl)]
    ordered = sorted(counted, key=lambda token: -token.kl)[:HARDEST]
    return table(f"Tokens of {title} with the most KL", COLUMNS, [_row(token) for token in ordered])
