"""Trajectories token by token as JSON values, and the files that show them: ``tokens.jsonl`` and ``texts.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.data.model_lookup import load_tokenizer
from common.data.rendering import context_of, teacher_sequence
from common.data.token_text import decode_ids, token_texts
from common.protocol.schema import LOGPROB_FLOOR, Context, Mask, Prompt, ScoredTrajectory
from common.telemetry.run_files import RunFiles

MAX_TOKENS = 512
"""Recorded tokens per trajectory, from its start."""

TOP_TOKENS = 3
"""Most likely tokens recorded per position and side."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One trajectory: its prompt, and the JSON values of `record_tokens`."""

    prompt: Prompt
    values: dict[str, Any]

    @property
    def sample_id(self) -> str:
        """Id of the recorded sample."""
        return str(self.values["sample"])


def choose_samples(sample_ids: Iterable[str], max_samples: int) -> list[str]:
    """Return the `max_samples` ids with the smallest hashes, in that order.

    The choice is unbiased and depends on the ids alone: not on the order of arrival, the number of ranks or lengths.
    """
    return sorted(set(sample_ids), key=lambda sample_id: xxhash.xxh64_intdigest(sample_id.encode()))[:max_samples]


def choose_records(records: Iterable[TokenRecord], max_samples: int) -> tuple[TokenRecord, ...]:
    """Return the records of the samples that `choose_samples` picks from those of all ranks."""
    by_sample = {record.sample_id: record for record in records}
    return tuple(by_sample[sample] for sample in choose_samples(by_sample, max_samples))


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
    """Record the first n response tokens of one trajectory.

    Args:
        scored: the trajectory and its score; the teacher's log-probs of the sampled tokens come from there.
        counted: mask of the tokens that the loss counts, ``[T]``, T >= n.
        student: log-probs of the sampled tokens under the weights being trained, ``[n]``.
        kl: reverse KL per token, ``[n]``.
        student_ids, student_top: the student's most likely ids and their log-probs, ``[n, TOP_TOKENS]``.
        teacher_ids, teacher_top: the same for the teacher.

    NaN and infinities become None.
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
    """Return (id, log-prob) pairs per position, without padding and ids of zero probability."""
    return [
        [
            (int(token), round(float(value), 5))
            for token, value in zip(row, values, strict=True)
            if value > LOGPROB_FLOOR / 2
        ]
        for row, values in zip(ids, logprobs, strict=True)
    ]


class TokenRecordFiles:
    """Writes token records and prompts as text, so that a report needs neither the tokenizer nor the data."""

    def __init__(self, files: RunFiles, model: str, contexts: dict[str, Context]) -> None:
        """Load the tokenizer of `model`."""
        self._files = files
        self._tokenizer = load_tokenizer(model)
        self._contexts = contexts
        self._written: set[str] = set()

    def add_questions(self, prompts: Sequence[Prompt]) -> None:
        """Write held-out prompts to ``texts.jsonl`` as the student sees them."""
        for prompt in prompts:
            self._files.text({"row": prompt.row_id, "text": decode_ids(self._tokenizer, prompt.student_ids)})

    def add_records(self, step: int, records: Iterable[TokenRecord]) -> None:
        """Write one line per record to ``tokens.jsonl``, and each new context to ``texts.jsonl``."""
        for record in records:
            prompt, values = record.prompt, record.values
            texts = {
                "row": prompt.row_id,
                "teacher": prompt.teacher,
                "context": self._context(prompt),
                "context_id": prompt.context_id,
                **self._prompt(prompt),
                "pieces": token_texts(self._tokenizer, values["ids"]),
                **{side: self._as_text(values[side]) for side in ("student_top", "teacher_top")},
            }
            self._files.tokens({"step": step, **values, **texts})

    def _as_text(self, rows: Sequence[Sequence[tuple[int, float]]]) -> list[list[tuple[str, float]]]:
        return [[(decode_ids(self._tokenizer, [token]), value) for token, value in row] for row in rows]

    def _prompt(self, prompt: Prompt) -> dict[str, str]:
        """The end of the prompt that both sides saw, and the student's tokens before it, if any."""
        theirs = teacher_sequence(prompt, self._contexts)
        pairs = zip(reversed(prompt.student_ids), reversed(theirs), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        start = len(prompt.student_ids) - shared
        return {
            "prompt": decode_ids(self._tokenizer, prompt.student_ids[start:]),
            "student_start": decode_ids(self._tokenizer, prompt.student_ids[:start]),
        }

    def _context(self, prompt: Prompt) -> str | None:
        """Return the name of the text that only the teacher saw; write the text at its first use.

        If the tokenizer merges the prompt with its context, the text is the teacher's whole prompt.
        """
        if prompt.context is None and np.array_equal(prompt.teacher_ids, prompt.student_ids):
            return None
        name = prompt.context or f"prompt of {prompt.row_id}"
        if name not in self._written:
            context = context_of(prompt, self._contexts)
            ids = prompt.teacher_ids if context is None else context.ids
            self._files.text({"context": name, "text": decode_ids(self._tokenizer, ids)})
            self._written.add(name)
        return name
