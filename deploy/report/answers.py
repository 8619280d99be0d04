"""Held-out answers before and after training: learnt and forgotten rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploy.report.load_run import Record, RunData
from deploy.report.numbers import MISSING, spaced
from deploy.report.parts import Column, Table, View

MAX_ROWS = 25
"""Rows shown of each group."""

MAX_CHARACTERS = 1200
"""Characters shown of one text; ``samples.jsonl`` has the whole text."""

GROUPS = (
    ("learnt", "Wrong before, right after"),
    ("forgotten", "Right before, wrong after"),
    ("wrong", "Wrong before and after"),
    ("right", "Right before and after"),
)

COLUMNS = (
    Column("row"),
    *(Column(name, code=True) for name in ("prompt", "expected", "student before", "with context", "student after")),
)


@dataclass(frozen=True, slots=True)
class Row:
    """The first answer to a held-out row at each stage; None if the row has no answer there."""

    identity: str
    before: Record | None
    in_context: Record | None
    after: Record | None

    @property
    def group(self) -> str:
        """The name in `GROUPS`; a missing answer counts as wrong."""
        was, now = _right(self.before), _right(self.after)
        return ("right" if was else "learnt") if now else ("forgotten" if was else "wrong")


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer and its grade."""

    right: bool
    text: str


def _right(sample: Record | None) -> bool:
    return sample is not None and bool(sample.get("right"))


def held_out(samples: Sequence[Record]) -> list[Row]:
    """Collect the held-out rows, in the order of their first answers."""
    found: dict[str, dict[str, Record]] = {}
    for sample in samples:
        if sample.get("set") in ("base", "in_context", "final"):
            found.setdefault(str(sample.get("id")), {}).setdefault(str(sample["set"]), sample)
    return [Row(name, sets.get("base"), sets.get("in_context"), sets.get("final")) for name, sets in found.items()]


def answers_view(run: RunData) -> View:
    """(title, open, table) of each group; the groups of changed answers are open."""
    rows = held_out(run.samples)
    if not rows:
        return {"lead": None, "groups": []}
    if not any(row.after for row in rows):
        return {"lead": "There is no final evaluation.", "groups": [_group(run, "Before training", rows, opened=True)]}
    return {
        "lead": f"{len(rows)} held-out rows, the first answer to each. Student answers are without the context.",
        "groups": [
            _group(run, title, [row for row in rows if row.group == name], opened=name in ("learnt", "forgotten"))
            for name, title in GROUPS
        ],
    }


def _group(run: RunData, title: str, rows: Sequence[Row], *, opened: bool) -> tuple[str, bool, Table]:
    kept = [rows[index] for index in spaced(len(rows), MAX_ROWS)]
    cells = [
        [
            row.identity,
            clipped(run.questions.get(row.identity, MISSING)),
            clipped(_expected(row)),
            *(_verdict(sample) for sample in (row.before, row.in_context, row.after)),
        ]
        for row in kept
    ]
    some = "" if len(kept) == len(rows) else f" ({len(kept)} shown)"
    return f"{title}: {len(rows)}{some}", opened and bool(rows), Table(title, COLUMNS, cells, hide_caption=True)


def _expected(row: Row) -> str:
    for sample in (row.before, row.in_context, row.after):
        if sample is not None and sample.get("expected") is not None:
            return str(sample["expected"])
    return MISSING


def _verdict(sample: Record | None) -> Verdict | str:
    return MISSING if sample is None else Verdict(_right(sample), clipped(_answer(sample)))


def _answer(sample: Record) -> str:
    """The answer; for a game, its turns and outcome."""
    exchanges = sample.get("exchanges")
    if not isinstance(exchanges, list):
        return str(sample.get("answer", MISSING))
    turns = [" → ".join(str(part) for part in turn.values()) for turn in exchanges if isinstance(turn, dict)]
    return "\n".join([*turns, str(sample.get("outcome", ""))])


def clipped(text: str) -> str:
    """Cut `text` to `MAX_CHARACTERS` and state how many characters are left out."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … [{len(text) - MAX_CHARACTERS:,} more characters]"
