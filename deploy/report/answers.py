"""Held-out answers before and after: what was learnt, what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.report.html import Child, Html, tag
from deploy.report.load_run import Record, RunData
from deploy.report.numbers import spaced
from deploy.report.parts import Column, fold, section, table

MOST_ROWS = 25
"""Of each group."""

MOST_CHARACTERS = 1200
"""Of one text; ``samples.jsonl`` has all of it."""

GROUPS = (
    ("learnt", "Wrong before, right after"),
    ("lost", "Right before, wrong after"),
    ("wrong", "Wrong before and after"),
    ("right", "Right before and after"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """The first answer to a held-out row at each stage; None where there is none."""

    identity: str
    before: Record | None
    in_context: Record | None
    after: Record | None

    @property
    def group(self) -> str:
        """Which of `GROUPS`; a missing answer counts as a wrong one."""
        was, now = _right(self.before), _right(self.after)
        return ("right" if was else "learnt") if now else ("lost" if was else "wrong")


def _right(sample: Record | None) -> bool:
    return sample is not None and bool(sample.get("right"))


def held_out(samples: Sequence[Record]) -> list[Row]:
    """Rows in the order of their first answer."""
    found: dict[str, dict[str, Record]] = {}
    for sample in samples:
        if sample.get("set") in ("base", "in_context", "final"):
            found.setdefault(str(sample.get("id")), {}).setdefault(str(sample["set"]), sample)
    return [Row(name, sets.get("base"), sets.get("in_context"), sets.get("final")) for name, sets in found.items()]


def answers_section(run: RunData) -> Html:
    """Four groups, the changed ones open."""
    rows = held_out(run.samples)
    if not rows:
        return section("answers", "Answers", tag("p", "No held-out answers were written down.", class_="none"))
    finished = any(row.after for row in rows)
    if not finished:
        return section(
            "answers",
            "Answers",
            _group(run, "Before training", rows, opened=True),
            lead="There is no final evaluation.",
        )
    grouped = {name: [row for row in rows if row.group == name] for name, _ in GROUPS}
    return section(
        "answers",
        "Answers",
        [_group(run, title, grouped[name], opened=name in ("learnt", "lost")) for name, title in GROUPS],
        lead=f"{len(rows)} held-out rows, the first answer to each, the student always without the context.",
    )


def _group(run: RunData, title: str, rows: Sequence[Row], *, opened: bool) -> Html:
    kept = [rows[index] for index in spaced(len(rows), MOST_ROWS)]
    columns = [
        Column("row"),
        Column("prompt", code=True),
        Column("expected", code=True),
        Column("student before", code=True),
        Column("with context", code=True),
        Column("student after", code=True),
    ]
    cells: list[list[Child]] = [
        [
            row.identity,
            clipped(run.questions.get(row.identity, "–")),
            clipped(_expected(row)),
            *(_verdict(sample) for sample in (row.before, row.in_context, row.after)),
        ]
        for row in kept
    ]
    some = "" if len(kept) == len(rows) else f" ({len(kept)} of them shown)"
    inside = table(title, columns, cells, hide_caption=True) if rows else tag("p", "None.", class_="none")
    return fold(f"{title}: {len(rows)}{some}", inside, opened=opened and bool(rows), class_="group")


def _expected(row: Row) -> str:
    for sample in (row.before, row.in_context, row.after):
        if sample is not None and sample.get("expected") is not None:
            return str(sample["expected"])
    return "–"


def _verdict(sample: Record | None) -> Child:
    if sample is None:
        return "–"
    right = bool(sample.get("right"))
    word = "right" if right else "wrong"
    return [
        tag("span", "✓" if right else "✗", class_=f"verdict {word}", aria_hidden="true"),
        tag("span", f"{word}: ", class_="hidden"),
        clipped(_said(sample)),
    ]


def _said(sample: Record) -> str:
    """The answer; of a game, its turns."""
    exchanges = sample.get("exchanges")
    if not isinstance(exchanges, list):
        return str(sample.get("answer", "–"))
    turns = [" → ".join(str(part) for part in turn.values()) for turn in exchanges if isinstance(turn, dict)]
    return "\n".join([*turns, str(sample.get("outcome", ""))])


def clipped(text: str) -> str:
    """At most `MOST_CHARACTERS`, saying what is left out."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[:MOST_CHARACTERS]} … [{len(text) - MOST_CHARACTERS:,} characters more]"
