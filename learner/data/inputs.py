"""Reads, validates and renders the data of a run before any model starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from common.config.model import Config, ConfigError, DataConfig
from common.data.contexts import Pool, pool_digest, read_pool
from common.data.fingerprint import added_tokens, tokenizer_fingerprint
from common.data.model_lookup import load_tokenizer, model_limit
from common.data.rendering import Renderer, length_faults, teacher_sequence
from common.data.rows import DataError, Row, digest, read_rows
from common.data.special_tokens import control_tokens
from common.evaluation.graders import Grader, make_grader
from common.evaluation.perplexity import split_into_chunks
from common.files import seen_from
from common.protocol.schema import Context, Prompt, TokenSequence, as_ids
from learner.data.context_sampling import ContextSampler
from learner.data.games import environment_error, first_turn, refuse_games_if_unsupported
from learner.data.text_sizes import oversized_texts

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """What a run reads, before a tokenizer is needed."""

    train: list[Row]
    valid: list[Row]
    eval: list[Row]
    ood: dict[str, list[Row]]
    """Rows of other tasks by name."""
    texts: dict[str, str]
    """Texts for perplexity by name."""
    context: str
    """The context; with a pool, its first one."""
    pool: Pool | None
    grader: Grader

    def sets(self) -> dict[str, list[Row]]:
        """Rows by the key of their set."""
        named = {"data.train": self.train, "data.valid": self.valid, "data.eval": self.eval}
        return named | {f"eval.ood.{name}": rows for name, rows in self.ood.items()}


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
    added_tokens: dict[int, str]
    """Tokens of the student above its base vocabulary."""
    student_limit: int
    """Maximum tokens of a student sequence."""
    data_digest: str
    """sha256 of the training rows."""
    context_sampler: ContextSampler | None = None
    """Gives each training sample its context; set if there is a pool. `train` then has the context of most tokens, and
    each held-out row its own context."""
    pool_digest: str | None = None
    warnings: tuple[str, ...] = ()
    """Likely mistakes in rows and contexts, one line each."""

    def sets(self) -> dict[str, list[Prompt]]:
        """Rows by the key of their set; sets without rows are left out."""
        named = {"data.train": self.train, "data.valid": self.valid, "data.eval": self.eval}
        named |= {f"eval.ood.{name}": rows for name, rows in self.ood.items()}
        return {key: rows for key, rows in named.items() if rows}

    def teacher_tokens(self, rows: Sequence[Prompt]) -> dict[str, int]:
        """Teacher prompt tokens by row id, context included."""
        return {row.row_id: len(teacher_sequence(row, self.contexts)) for row in rows}


def read_inputs(config: Config) -> Inputs:
    """Read and render every row. Raises ConfigError or DataError, which name file, line or row."""
    return render_inputs(config, read_sources(config))


def read_sources(config: Config) -> Sources:
    """Read the context and every data set. Raises ConfigError or DataError with a line for each fault of each part."""
    data, faults = config.data, _Faults()
    pool = None
    if config.context.pool is not None:
        pool = faults.collect("", read_pool, config.context.pool)
        text = pool[0].text if pool else ""
    else:
        text = faults.collect("", config.context.read) or ""
    grader = faults.collect("", make_grader, config.eval.grader)
    train = faults.collect("data.train", read_rows, data.train, data, check=environment_error) or []
    faults.collect("data.train", _check_teachers, train, tuple(config.named_teachers()))
    valid = faults.collect("data.valid", _held_out, data, data.valid) or []
    held_out = faults.collect("data.eval", _held_out, data, data.eval) or []
    ood = {
        name: faults.collect(f"eval.ood.{name}", _held_out, data, path) or [] for name, path in config.eval.ood.items()
    }
    texts = {
        name: faults.collect("eval.perplexity", _text, path) or "" for name, path in config.eval.perplexity.items()
    }
    faults.raise_all()
    assert grader is not None
    return Sources(train, valid, held_out, ood, texts, text, pool, grader)


def render_inputs(config: Config, sources: Sources) -> Inputs:
    """Render every row with the student's tokenizer. Raises DataError, which names set and row, and ConfigError."""
    tokenizer = load_tokenizer(config.student.model)
    renderer = Renderer(tokenizer, sources.context, config.student, config.context.placement)
    limit = config.student.max_sequence_tokens or model_limit(config.student.model)
    if limit is None:
        raise ConfigError(
            f"{config.student.model} states no longest sequence (max_position_embeddings): set "
            "student.max_sequence_tokens"
        )
    if faults := list(oversized_texts(config, tokenizer, sources.context, sources.sets(), limit)):
        raise DataError("\n".join(faults))
    turns = [first_turn(row) for row in sources.train]
    pool = sources.pool
    sampler = None if pool is None else ContextSampler(pool, renderer, config.run.seed, turns)
    other_tasks = replace(renderer, contexts={}, without_shared_prefix=[])  # no teacher gets their contexts
    chunk_tokens = min(config.eval.perplexity_chunk_tokens, limit)
    inputs = Inputs(
        train=[turn.render(renderer) if sampler is None else sampler.with_longest_context(turn) for turn in turns],
        valid=_rendered(sources.valid, renderer, sampler),
        eval=_rendered(sources.eval, renderer, sampler),
        ood={name: [first_turn(row).render(other_tasks) for row in rows] for name, rows in sources.ood.items()},
        texts={
            name: _chunks(tokenizer, text, chunk_tokens, config.eval.perplexity[name])
            for name, text in sources.texts.items()
        },
        contexts=renderer.contexts,
        grader=sources.grader,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        added_tokens=added_tokens(tokenizer),
        student_limit=limit,
        data_digest=digest(config.data, sources.train),
        context_sampler=sampler,
        pool_digest=None if pool is None else pool_digest(pool),
        warnings=tuple(_row_warnings(renderer, sources)),
    )
    refuse_games_if_unsupported(inputs.train, config.rollout, config.teacher)
    _check_student_lengths(config, inputs)
    return inputs


def answer_limit(config: Config, key: str) -> tuple[str, int]:
    """(key of the configuration, most tokens) of an answer to a row of the set `key`, such as ``data.train``."""
    if key == "data.train" or config.eval.max_tokens is None:
        return "rollout.max_tokens", config.rollout.max_tokens
    return "eval.max_tokens", config.eval.max_tokens


def _check_student_lengths(config: Config, inputs: Inputs) -> None:
    faults = []
    named = config.student.max_sequence_tokens is not None
    for key, rows in inputs.sets().items():
        name, tokens = answer_limit(config, key)
        faults += length_faults(
            f"{key}: ",
            "student",
            {row.row_id: len(row.student_ids) for row in rows},
            answer=(name, tokens),
            limit=("student.max_sequence_tokens" if named else "the model's own limit", inputs.student_limit),
        )
    if faults:
        raise DataError("\n".join(faults))


class _Faults:
    """Collects the faults of several parts, to report all of them at once."""

    def __init__(self) -> None:
        self._found: list[Exception] = []

    def collect(self, key: str, read: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
        """Return ``read(*arguments)``, or None after a fault, which is kept with `key` before each of its lines."""
        try:
            return read(*arguments, **options)
        except (ConfigError, DataError) as error:
            lead = f"{key}: " if key else ""
            self._found.append(type(error)("\n".join(lead + line for line in str(error).splitlines())))
            return None

    def raise_all(self) -> None:
        if self._found:
            kind = ConfigError if isinstance(self._found[0], ConfigError) else DataError
            raise kind("\n".join(map(str, self._found)))


def _rendered(rows: Sequence[Row], renderer: Renderer, sampler: ContextSampler | None) -> list[Prompt]:
    turns = map(first_turn, rows)
    return [turn.render(renderer) if sampler is None else sampler.held_out(turn) for turn in turns]


def _row_warnings(renderer: Renderer, sources: Sources) -> Iterator[str]:
    for name, held_rows in (("train", sources.train), ("valid", sources.valid), ("eval", sources.eval)):
        if held := control_tokens(renderer.tokenizer, held_rows):
            row, token = next(iter(held.items()))
            yield (
                f"data.{name}: {len(held)} rows hold the text of a special token, which becomes a control token for "
                f"student and teacher; the first is row {row!r} with {token!r}"
            )
    if rows := renderer.without_shared_prefix:
        yield (
            f"{len(rows)} rows (the first is {rows[0]!r}) do not start with the context's own tokens, because the "
            "tokenizer merges across its end: their scores are right, but do not use the context's cache"
        )


def _held_out(data: DataConfig, path: Path | None) -> list[Row]:
    return [] if path is None else read_rows(path, data, need_answers=True, check=environment_error)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}{seen_from(path)}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def _chunks(tokenizer: Any, text: str, tokens: int, path: Path) -> list[TokenSequence]:
    """Chunks of a text's tokens, which begin with the BOS token if the tokenizer adds one."""
    try:
        return split_into_chunks(as_ids(tokenizer(text)["input_ids"]), tokens)
    except ValueError as error:
        raise DataError(f"eval.perplexity: {path}: {error}") from error


def _check_teachers(rows: Sequence[Row], known: Sequence[str]) -> None:
    for row in rows:
        if row.teacher is not None and row.teacher not in known:
            raise DataError(
                f"row {row.id!r} names teacher {row.teacher!r}, the configuration has {', '.join(known)} "
                "(see `teachers`)"
            )
