"""Reads, validates and renders the data of a run before any model starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.config.model import Config, ConfigError, DataConfig, StudentConfig
from common.data.contexts import pool_digest, read_pool
from common.data.fingerprint import tokenizer_fingerprint
from common.data.rendering import Renderer, check_lengths, load_tokenizer, teacher_sequence
from common.data.rows import DataError, Row, digest, read_rows
from common.evaluation.graders import Grader, make_grader
from common.evaluation.perplexity import split_into_chunks
from common.models.positions import sequence_limit
from common.protocol.schema import Context, Prompt, TokenSequence, as_ids
from learner.data.context_sampling import ContextSampler
from learner.data.games import environment_error, first_turn, refuse_games_if_unsupported

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Rendered rows by set, the contexts that they name, and the grader of answers."""

    train: list[Prompt]
    valid: list[Prompt]
    eval: list[Prompt]
    ood: dict[str, list[Prompt]]
    """Rows of other tasks by name, rendered without a context."""
    texts: dict[str, list[TokenSequence]]
    """Chunks of each text by name, for perplexity."""
    contexts: dict[str, Context]
    grader: Grader
    tokenizer_fingerprint: str
    student_limit: int
    """Maximum tokens of a student sequence."""
    data_digest: str
    """sha256 of the training rows."""
    context_sampler: ContextSampler | None = None
    """Gives each training sample its context; set if there is a pool. `train` then has the context of most tokens, and
    each held-out row its own context."""
    pool_digest: str | None = None

    def student_tokens(self) -> dict[str, int]:
        """Student prompt tokens by row id; rows of other tasks are ``TASK/ROW``."""
        own = {row.row_id: row for row in (*self.train, *self.valid, *self.eval)}
        others = {f"{name}/{row.row_id}": row for name, rows in self.ood.items() for row in rows}
        return {name: len(row.student_ids) for name, row in {**own, **others}.items()}

    def teacher_tokens(self) -> dict[str, int]:
        """Teacher prompt tokens by row id, context included."""
        rows = (*self.train, *self.valid, *self.eval)
        return {row.row_id: len(teacher_sequence(row, self.contexts)) for row in rows}


def read_inputs(config: Config) -> Inputs:
    """Read and render every row. Raises ConfigError or DataError, which name file, line or row."""
    grader = make_grader(config.eval.grader)
    train = read_rows(config.data.train, config.data, check=environment_error)
    valid, held_out = _held_out(config.data, config.data.valid), _held_out(config.data, config.data.eval)
    _check_teachers(config.data.train, train, tuple(config.named_teachers()))
    pool = None if config.context.pool is None else read_pool(config.context.pool)
    text = config.context.read() if pool is None else pool[0].text
    tokenizer = load_tokenizer(config.student.model)
    renderer = Renderer(tokenizer, text, config.student, config.context.placement)
    turns = [first_turn(row) for row in train]
    sampler = None if pool is None else ContextSampler(pool, renderer, config.run.seed, turns)
    limit = _student_limit(config.student)
    other_tasks = replace(renderer, contexts={}, without_shared_prefix=[])  # no teacher gets their contexts
    chunk_tokens = min(config.eval.perplexity_chunk_tokens, limit)
    inputs = Inputs(
        train=[turn.render(renderer) if sampler is None else sampler.with_longest_context(turn) for turn in turns],
        valid=_rendered(valid, renderer, sampler),
        eval=_rendered(held_out, renderer, sampler),
        ood={
            name: [first_turn(row).render(other_tasks) for row in _held_out(config.data, path)]
            for name, path in config.eval.ood.items()
        },
        texts={name: _chunks(path, tokenizer, chunk_tokens) for name, path in config.eval.perplexity.items()},
        contexts=renderer.contexts,
        grader=grader,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        student_limit=limit,
        data_digest=digest(config.data, train),
        context_sampler=sampler,
        pool_digest=None if pool is None else pool_digest(pool),
    )
    refuse_games_if_unsupported(inputs.train, config.rollout, config.teacher)
    if renderer.without_shared_prefix:
        log.warning(
            "%d rows (the first is %r) do not start with the context's own tokens, because the tokenizer merges across "
            "its end: their scores are right, but do not use the context's cache",
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


def _rendered(rows: Sequence[Row], renderer: Renderer, sampler: ContextSampler | None) -> list[Prompt]:
    turns = map(first_turn, rows)
    return [turn.render(renderer) if sampler is None else sampler.held_out(turn) for turn in turns]


def _held_out(data: DataConfig, path: Path | None) -> list[Row]:
    return [] if path is None else read_rows(path, data, need_answers=True, check=environment_error)


def _chunks(path: Path, tokenizer: Any, tokens: int) -> list[TokenSequence]:
    """Chunks of a text's tokens, which begin with the BOS token if the tokenizer adds one."""
    try:
        text = path.read_bytes().decode("utf-8")
        return split_into_chunks(as_ids(tokenizer(text)["input_ids"]), tokens)
    except (OSError, ValueError) as error:
        raise DataError(f"eval.perplexity: {path}: {error}") from error


def _check_teachers(path: Path, rows: Sequence[Row], known: Sequence[str]) -> None:
    for row in rows:
        if row.teacher is not None and row.teacher not in known:
            raise DataError(
                f"{path}: row {row.id!r} names teacher {row.teacher!r}, the configuration has {', '.join(known)} "
                "(see `teachers`)"
            )


def _student_limit(student: StudentConfig) -> int:
    from transformers import AutoConfig

    limit = sequence_limit(AutoConfig.from_pretrained(student.model), student.max_sequence_tokens)
    if limit is None:
        raise ConfigError(f"{student.model} names no longest sequence: set student.max_sequence_tokens")
    return limit
