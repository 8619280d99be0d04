"""What a run reads, checked and rendered before anything heavy starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config.model import Config, DataConfig
from common.data.contexts import pool_digest, read_pool
from common.data.fingerprint import tokenizer_fingerprint
from common.data.rendering import Renderer, check_lengths, load_tokenizer, teacher_sequence
from common.data.rows import DataError, Row, digest, read_rows
from common.evaluation.graders import Grader, make_grader
from common.evaluation.perplexity import chunks_of
from common.protocol.schema import Context, Prompt, TokenSequence, as_ids
from learner.data.context_sampling import ContextDraw
from learner.data.games import fault_of, first_turn, refuse_unplayable, render

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Rendered rows by set, the contexts they name, and how answers are judged."""

    train: list[Prompt]
    valid: list[Prompt]
    eval: list[Prompt]
    ood: dict[str, list[Prompt]]
    """Rows of other tasks by name, which no context goes with."""
    texts: dict[str, list[TokenSequence]]
    """Texts by name, in chunks."""
    contexts: dict[str, Context]
    grader: Grader
    tokenizer_fingerprint: str
    student_limit: int
    """Tokens that the student takes."""
    data_digest: str
    """sha256 of what is trained on."""
    draw: ContextDraw | None = None
    """Of a pool: gives each training sample its context. `train` is then under the one that takes most tokens, held-out
    rows each under one of its own."""
    pool_digest: str | None = None

    def student_tokens(self) -> dict[str, int]:
        """Prompt tokens on the student's side by row, those of other tasks under ``TASK/ROW``."""
        own = {row.row_id: row for row in (*self.train, *self.valid, *self.eval)}
        others = {f"{name}/{row.row_id}": row for name, rows in self.ood.items() for row in rows}
        return {name: len(row.student_ids) for name, row in {**own, **others}.items()}

    def teacher_tokens(self) -> dict[str, int]:
        """Prompt tokens on the teacher's side by row, the context included."""
        rows = (*self.train, *self.valid, *self.eval)
        return {row.row_id: len(teacher_sequence(row, self.contexts)) for row in rows}


def read_inputs(config: Config) -> Inputs:
    """Read and render every row; raises ConfigError or DataError naming file, line or row."""
    grader = make_grader(config.eval.grader)
    train = read_rows(config.data.train, config.data, check=fault_of)
    valid, held_out = _held_out(config.data, config.data.valid), _held_out(config.data, config.data.eval)
    _check_teachers(config.data.train, train, tuple(config.named_teachers()))
    pool = None if config.context.pool is None else read_pool(config.context.pool)
    text = config.context.read() if pool is None else pool[0].text
    tokenizer = load_tokenizer(config.student.model)
    renderer = Renderer(tokenizer, text, config.student, config.context.placement)
    turns = [first_turn(row) for row in train]
    draw = None if pool is None else ContextDraw(pool, renderer, config.run.seed, turns)
    limit = config.student.max_sequence_tokens or _model_limit(config.student.model)
    apart = replace(renderer, contexts={}, without_shared_prefix=[])  # what no teacher is to see
    chunk_tokens = min(config.eval.perplexity_chunk_tokens, limit)
    inputs = Inputs(
        train=[turn.render(renderer) if draw is None else draw.longest(turn) for turn in turns],
        valid=_rendered(valid, renderer, draw),
        eval=_rendered(held_out, renderer, draw),
        ood={
            name: [render(row, apart) for row in _held_out(config.data, path)] for name, path in config.eval.ood.items()
        },
        texts={name: _chunks(path, tokenizer, chunk_tokens) for name, path in config.eval.perplexity.items()},
        contexts=renderer.contexts,
        grader=grader,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        student_limit=limit,
        data_digest=digest(config.data, train),
        draw=draw,
        pool_digest=None if pool is None else pool_digest(pool),
    )
    refuse_unplayable(config, inputs.train)
    if renderer.without_shared_prefix:
        log.warning(
            "%d rows (the first is %r) do not start with the context's own tokens, the tokenizer merges across its "
            "end: they are scored right, but without the context's cache",
            len(renderer.without_shared_prefix),
            renderer.without_shared_prefix[0],
        )
    check_lengths(
        "student",
        inputs.student_tokens(),
        max_tokens=max(config.rollout.max_tokens, config.eval.max_tokens or 0),
        limit=limit,
    )
    return inputs


def _rendered(rows: Sequence[Row], renderer: Renderer, draw: ContextDraw | None) -> list[Prompt]:
    turns = map(first_turn, rows)
    return [turn.render(renderer) if draw is None else draw.held_out(turn) for turn in turns]


def _held_out(data: DataConfig, path: Path | None) -> list[Row]:
    return [] if path is None else read_rows(path, data, need_answers=True, check=fault_of)


def _chunks(path: Path, tokenizer: Any, tokens: int) -> list[TokenSequence]:
    """A text's chunks, behind what the tokenizer puts ahead of a text (BOS or nothing)."""
    try:
        text = path.read_bytes().decode("utf-8")
        return chunks_of(as_ids(tokenizer(text)["input_ids"]), tokens)
    except (OSError, ValueError) as error:
        raise DataError(f"eval.perplexity: {path}: {error}") from error


def _check_teachers(path: Path, rows: Sequence[Row], known: Sequence[str]) -> None:
    for row in rows:
        if row.teacher is not None and row.teacher not in known:
            raise DataError(
                f"{path}: row {row.id!r} names teacher {row.teacher!r}, the configuration has {', '.join(known)} "
                "(see `teachers`)"
            )


def _model_limit(model: str) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings)
