"""Answers token by token as plain values, and the files that show them: ``tokens.jsonl`` and ``texts.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.data.rendering import load_tokenizer
from common.data.token_text import pieces, text_of
from common.protocol.schema import LOGPROB_FLOOR, Context, Mask, Prompt, ScoredTrajectory
from common.telemetry.run_files import RunFiles

MOST_TOKENS = 512
"""Of one answer, from its beginning."""

LIKELIEST = 3
"""Tokens that each side finds likeliest, at every position."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One answer: its prompt, and what `record_tokens` says of its tokens, as JSON values."""

    prompt: Prompt
    values: dict[str, Any]

    @property
    def sample_id(self) -> str:
        """Whose tokens they are."""
        return str(self.values["sample"])


def place(sample_id: str) -> int:
    """Where a sample stands in the order by which a step's few are chosen: no better than at random, and always the
    same.
    """
    return xxhash.xxh64_intdigest(sample_id.encode())


def first_places(sample_ids: Iterable[str], most: int) -> list[str]:
    """The `most` that stand first, in their order."""
    return sorted(set(sample_ids), key=place)[:most]


def first_records(records: Iterable[TokenRecord], most: int) -> tuple[TokenRecord, ...]:
    """Of the records of all ranks the `most` that stand first."""
    by_sample = {record.sample_id: record for record in records}
    return tuple(by_sample[sample] for sample in first_places(by_sample, most))


def record_tokens(
    scored: ScoredTrajectory,
    counted: Mask,
    student: Floats,
    kl: Floats,
    student_ids: NDArray[np.int64],
    student_top: Floats,
    teacher_ids: NDArray[np.int64],
    teacher_top: Floats,
) -> TokenRecord:
    """One answer: ids, log-probs ``[n]`` of the sampled tokens on both sides (the student's under the
    weights that are being trained), KL ``[n]``, and what each side finds likeliest (``[n, 3]``).

    `counted` ``[T]``, T >= n: which tokens the loss counts. A value that is no number becomes None.
    """
    trajectory, n = scored.trajectory, len(student)
    values = {
        "sample": trajectory.sample_id,
        "finish_reason": trajectory.finish_reason,
        "response_tokens": len(trajectory.response_ids),
        "ids": trajectory.response_ids[:n].tolist(),
        "student_logprobs": _numbers(student),
        "teacher_logprobs": _numbers(scored.score.sampled_logprob[:n]),
        "kl": _numbers(kl),
        "counted": counted[:n].tolist(),
        "student_top": _pairs(student_ids, student_top),
        "teacher_top": _pairs(teacher_ids, teacher_top),
    }
    return TokenRecord(trajectory.prompt, values)


def _numbers(values: Floats) -> list[float | None]:
    return [round(float(value), 5) if np.isfinite(value) else None for value in values]


def _pairs(ids: NDArray[np.int64], logprobs: Floats) -> list[list[tuple[int, float]]]:
    """(id, log-prob) by position; padding and what cannot be emitted left out."""
    return [
        [
            (int(one), round(float(value), 5))
            for one, value in zip(row, values, strict=True)
            if value > LOGPROB_FLOOR / 2
        ]
        for row, values in zip(ids, logprobs, strict=True)
    ]


class ShownFiles:
    """Writes what a report shows beside numbers, as text: it needs neither the tokenizer nor the data any more."""

    def __init__(self, files: RunFiles, model: str, contexts: dict[str, Context]) -> None:
        """`model` has the tokenizer."""
        self._files = files
        self._tokenizer = load_tokenizer(model)
        self._contexts = contexts
        self._written: set[str] = set()

    def questions(self, rows: Sequence[Prompt]) -> None:
        """The prompts of held-out rows as the student sees them."""
        for row in rows:
            self._files.text({"row": row.row_id, "text": text_of(self._tokenizer, row.student_ids)})

    def tokens(self, step: int, records: Iterable[TokenRecord]) -> None:
        """One line of ``tokens.jsonl`` for each, the contexts that they name in ``texts.jsonl``."""
        for record in records:
            prompt, values = record.prompt, record.values
            texts = {
                "row": prompt.row_id,
                "teacher": prompt.teacher,
                "context": self._context(prompt),
                "context_id": prompt.context_id,
                "prompt": text_of(self._tokenizer, prompt.student_ids),
                "pieces": pieces(self._tokenizer, values["ids"]),
                **{side: self._named(values[side]) for side in ("student_top", "teacher_top")},
            }
            self._files.tokens({"step": step, **values, **texts})

    def _named(self, rows: Sequence[Sequence[tuple[int, float]]]) -> list[list[tuple[str, float]]]:
        return [[(text_of(self._tokenizer, [one]), value) for one, value in row] for row in rows]

    def _context(self, prompt: Prompt) -> str | None:
        """Name of the text that the teacher alone saw, written down when it is first met.

        A row whose prompt merges with its context has no prefix of its own: then it is the teacher's whole prompt.
        """
        if prompt.context is None and np.array_equal(prompt.teacher_ids, prompt.student_ids):
            return None
        name = prompt.context or f"prompt of {prompt.row_id}"
        if name not in self._written:
            ids = prompt.teacher_ids if prompt.context is None else self._contexts[prompt.context].ids
            self._files.text({"context": name, "text": text_of(self._tokenizer, ids)})
            self._written.add(name)
        return name
