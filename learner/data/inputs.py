"""Reads, validates and renders the data of a run before any model starts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.config.model import Config, ConfigError, ContextConfig, DataConfig, StudentConfig
from common.data.answer_hook import load_answer_hook
from common.data.columns import looks_like_context
from common.data.contexts import Pool, pool_digest, read_pool
from common.data.fingerprint import added_tokens, tokenizer_fingerprint
from common.data.model_lookup import load_tokenizer, model_limit
from common.data.rendered_checks import length_faults
from common.data.rendering import Renderer
from common.data.rows import DataDigest, DataError, Row, iterate_rows
from common.data.special_tokens import control_token_in, control_tokens
from common.data.turns import looks_like_turns, read_turns
from common.evaluation.graders import Grader, make_grader, make_reward
from common.evaluation.perplexity import split_into_chunks
from common.files import seen_from
from common.protocol.schema import Context, Prompt, TokenSequence, as_ids
from learner.data.context_sampling import ContextSampler
from learner.data.games import FirstTurn, environment_error, first_turn, refuse_games_if_unsupported
from learner.data.prompts import LazyPrompts, PromptFacts, facts_of, rows_to_check, spread
from learner.data.stored_rows import StoredRows
from learner.data.text_sizes import oversized_texts

T = TypeVar("T")

PARENT_ROWS = 4096
"""Training rows that are searched for texts before the rows' own contexts, spread evenly over all of them."""


@dataclass(frozen=True)
class Sources:
    """What a run reads, before a tokenizer is needed."""

    train: StoredRows
    valid: StoredRows
    eval: StoredRows
    ood: dict[str, StoredRows]
    """Rows of other tasks by name."""
    texts: dict[str, str]
    """Texts for perplexity by name."""
    context: str
    """The context for all rows; with a pool, its first one; empty if each row has its own and there is none for all."""
    pool: Pool | None
    grader: Grader
    data_digest: str
    """sha256 of the training rows."""
    unused: dict[str, dict[str, str]]
    """Set -> column that no row uses -> column of a row that its name resembles and that is absent, else ""."""
    set_sizes: tuple[int, ...] = ()
    """Rows of ``data.train`` and of each set of ``data.mix``, which follow one another in `train`."""

    def sets(self) -> dict[str, StoredRows]:
        """Rows by the key of their set."""
        named = {"data.train": self.train, "data.valid": self.valid, "data.eval": self.eval}
        return named | {f"eval.ood.{name}": rows for name, rows in self.ood.items()}


@dataclass(frozen=True)
class Inputs:
    """Rendered rows by set, the contexts that they name, and the grader of answers."""

    train: Sequence[Prompt]
    valid: list[Prompt]
    eval: list[Prompt]
    ood: dict[str, list[Prompt]]
    """Rows of other tasks by name, rendered without a context."""
    facts: dict[str, list[PromptFacts]]
    """Sizes of the rows by the key of their set; of ``data.train`` those of `rows_to_check`. Sets without rows are left
    out."""
    texts: dict[str, list[TokenSequence]]
    """Chunks of each text by name, for perplexity."""
    contexts: dict[str, Context]
    """Contexts that prompts name; contexts of single rows travel with their prompts."""
    context_names: tuple[str, ...]
    """Identity of the contexts, in place of those of single rows: the data's digest covers these."""
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
    set_sizes: tuple[int, ...] = ()
    """Rows of ``data.train`` and of each set of ``data.mix``, which follow one another in `train`."""
    warnings: tuple[str, ...] = ()
    """Likely mistakes in rows and contexts, one line each."""

    @property
    def has_context_for_eval(self) -> bool:
        """True if the teacher sees more than the student in every row of ``data.eval``, whatever the answer."""
        return not any(row.row is not None or _is_plain(row) for row in self.eval)


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
        if config.context.placement == "turns" and text:
            faults.collect(
                "context.text" if config.context.file is None else str(config.context.file), read_turns, text
            )
    grader = faults.collect("", make_grader, config.eval.grader)
    if config.loss.reward is not None:
        faults.collect("loss.reward", make_reward, config.loss.reward)
    if config.context.from_rollout is not None:
        faults.collect("", load_answer_hook, config.context.from_rollout)
    own, unused = config.context.from_rows, {name: dict[str, str]() for name in ("train", "valid", "eval")}

    keep_columns = config.context.from_rollout is not None
    read = partial(iterate_rows, own_contexts=own, keep_columns=keep_columns, check=environment_error)
    digest = DataDigest(data)

    def held_out(key: str, path: Path | None, columns: dict[str, str] | None) -> StoredRows:
        rows = StoredRows()
        if path is not None:
            found = read(path, data, need_answers=True, unused=columns)
            faults.collect(key, rows.extend, found)
        return rows

    def trained(path: Path, settings: DataConfig, columns: dict[str, str] | None, part: str | None) -> Iterator[Row]:
        rows = read(path, settings, need_answers=config.loss.reward_weight > 0, unused=columns)
        if part is not None:
            rows = (_of_part(row, part, data.mix[part].teacher) for row in rows)
        return digest.each(_fit_to_train(rows, tuple(config.named_teachers()), need_contexts=own and not text))

    train = StoredRows()
    faults.collect("data.train", train.extend, trained(data.train, data, unused["train"], None))
    sizes = [len(train)]
    for name, mixed in data.mix.items():
        rows = trained(mixed.train, data.of_mixed(name), None, name)
        faults.collect(f"data.mix.{name}.train", train.extend, rows)
        sizes.append(len(train) - sum(sizes))
    valid = held_out("data.valid", data.valid, unused["valid"])
    evaluated = held_out("data.eval", data.eval, unused["eval"])
    ood = {name: held_out(f"eval.ood.{name}", path, None) for name, path in config.eval.ood.items()}
    texts = {
        name: faults.collect("eval.perplexity", _text, path) or "" for name, path in config.eval.perplexity.items()
    }
    faults.raise_all()
    assert grader is not None
    return Sources(train, valid, evaluated, ood, texts, text, pool, grader, digest.hexdigest(), unused, tuple(sizes))


def render_inputs(config: Config, sources: Sources, *, every_row: bool = True) -> Inputs:
    """Render the rows with the student's tokenizer. Raises DataError, which names set and row, and ConfigError.

    Training rows with their own contexts are rendered again whenever they are read. Without `every_row` only some of
    them are rendered here (`rows_to_check`), so that a run over many rows starts at once.
    """
    tokenizer, own = load_tokenizer(config.student.model), config.context.by_row
    renderer = make_renderer(tokenizer, sources.context, config.student, config.context)
    if own:
        some = (sources.train[index] for index in spread(len(sources.train), PARENT_ROWS))
        rows = itertools.chain(some, sources.valid, sources.eval)
        made = config.context.from_rollout is not None  # then every row will have one
        renderer.share_parents(row.model_copy(update={"context": "-"}) if made else row for row in rows)
    limit = config.student.max_sequence_tokens or model_limit(config.student.model)
    if limit is None:
        raise ConfigError(
            f"{config.student.model} states no longest sequence (max_position_embeddings): set "
            "student.max_sequence_tokens"
        )
    if faults := list(oversized_texts(config, tokenizer, sources.context, sources.sets(), limit)):
        raise DataError("\n".join(faults))
    games = {index: first_turn(sources.train[index]) for index in sources.train.games}
    pool, sampler = sources.pool, None
    other_tasks = replace(renderer, contexts={}, without_shared_prefix=[])  # no teacher gets their contexts
    checked = rows_to_check(sources.train, every_row=every_row) if own else range(len(sources.train))
    train: Sequence[Prompt]
    if own:
        train = LazyPrompts(sources.train, games, renderer, answer_limit(config, "data.train"))
        train.limits["student"] = _student_limit(config, limit)
        facts = [facts_of(train.render(index), renderer.contexts) for index in checked]
    else:
        turns = [games.get(index) or FirstTurn(row) for index, row in enumerate(sources.train)]
        if pool is not None:
            sampler = ContextSampler(pool, renderer, config.run.seed, turns)
        train = [turn.render(renderer) if sampler is None else sampler.with_longest_context(turn) for turn in turns]
        facts = [facts_of(prompt, renderer.contexts) for prompt in train]
    valid, held_out = (_rendered(rows, renderer, sampler) for rows in (sources.valid, sources.eval))
    ood = {name: [first_turn(row).render(other_tasks) for row in rows] for name, rows in sources.ood.items()}
    sets = {"data.valid": valid, "data.eval": held_out, **{f"eval.ood.{name}": rows for name, rows in ood.items()}}
    known = {**renderer.contexts, **other_tasks.contexts}
    chunk_tokens = min(config.eval.perplexity_chunk_tokens, limit)
    inputs = Inputs(
        train=train,
        valid=valid,
        eval=held_out,
        ood=ood,
        facts={
            "data.train": facts,
            **{key: [facts_of(prompt, known) for prompt in rows] for key, rows in sets.items() if rows},
        },
        texts={
            name: _chunks(tokenizer, text, chunk_tokens, config.eval.perplexity[name])
            for name, text in sources.texts.items()
        },
        contexts=renderer.contexts,
        context_names=(_own_identity(config.context, sources.context),) if own else tuple(renderer.contexts),
        grader=sources.grader,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        added_tokens=added_tokens(tokenizer),
        student_limit=limit,
        data_digest=sources.data_digest,
        context_sampler=sampler,
        pool_digest=None if pool is None else pool_digest(pool),
        set_sizes=sources.set_sizes,
        warnings=tuple(_row_warnings(renderer, sources, (sources.train[index] for index in checked))),
    )
    refuse_games_if_unsupported(games.values(), config)
    _check_student_lengths(config, inputs)
    return inputs


def answer_limit(config: Config, key: str) -> tuple[str, int]:
    """(key of the configuration, most tokens) of an answer to a row of the set `key`, such as ``data.train``."""
    if key == "data.train" or config.eval.max_tokens is None:
        return "rollout.max_tokens", config.rollout.max_tokens
    return "eval.max_tokens", config.eval.max_tokens


def _check_student_lengths(config: Config, inputs: Inputs) -> None:
    faults = []
    for key, rows in inputs.facts.items():
        name, tokens = answer_limit(config, key)
        faults += length_faults(
            f"{key}: ",
            "student",
            {row.row_id: row.student_tokens for row in rows},
            answer=(name, tokens),
            limit=_student_limit(config, inputs.student_limit),
        )
    if faults:
        raise DataError("\n".join(faults))


def _student_limit(config: Config, tokens: int) -> tuple[str, int]:
    named = config.student.max_sequence_tokens is not None
    return "student.max_sequence_tokens" if named else "the model's own limit", tokens


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


def make_renderer(tokenizer: Any, text: str, student: StudentConfig, context: ContextConfig) -> Renderer:
    """The renderer of a run's rows; `text` is the context for all rows, or one of the pool."""
    return Renderer(
        tokenizer,
        text,
        student,
        context.placement,
        teacher_template_kwargs=context.chat_template_kwargs,
        contexts_travel=context.by_row,
    )


def _own_identity(context: ContextConfig, text: str) -> str:
    """Digest of everything but the rows that decides the rows' own contexts."""
    value = [text, context.placement, context.chat_template_kwargs, context.from_rollout]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_plain(prompt: Prompt) -> bool:
    """True if the teacher sees what the student sees."""
    return prompt.context is None and np.array_equal(prompt.teacher_ids, prompt.student_ids)


def _row_warnings(renderer: Renderer, sources: Sources, train: Iterable[Row]) -> Iterator[str]:
    for name, columns in sources.unused.items():
        for column, resembles in columns.items():
            if looks_like_context(column):
                yield (
                    f"data.{name}: column {column!r} looks like a context and is not used: to show it to the teacher "
                    f"set context.from_rows=true and data.columns={{context: {column}}}, else name it in data.ignore"
                )
            elif resembles:
                yield (
                    f"data.{name}: column {column!r} is not used; did you mean {resembles!r}? data.columns maps a "
                    "column, data.ignore leaves one out"
                )
    if renderer.placement != "turns" and looks_like_turns(sources.context):
        yield (
            "the context is a list of messages, and is inserted as it is written: set context.placement=turns to make "
            "turns of them"
        )
    elif sources.train[0].messages and (token := control_token_in(renderer.tokenizer, sources.context)) is not None:
        yield (
            f"the context holds the text of a special token, {token!r}, which becomes a control token: for turns of a "
            "chat write a list of messages, and set context.placement=turns"
        )
    sets: tuple[tuple[str, Iterable[Row]], ...] = (("train", train), ("valid", sources.valid), ("eval", sources.eval))
    for name, held_rows in sets:
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


def _of_part(row: Row, part: str, teacher: str | None) -> Row:
    """Name a row of ``data.mix`` after its set, and give it the set's teacher."""
    return row.model_copy(update={"id": f"{part}/{row.id}", "teacher": row.teacher or teacher})


def _fit_to_train(rows: Iterable[Row], teachers: Sequence[str], *, need_contexts: bool) -> Iterator[Row]:
    """Yield `rows`. Raises DataError, after the last, for a row of an unknown teacher, and with `need_contexts` for one
    that gives the teacher nothing to see.
    """
    count, without, faults = 0, list[str](), list[str]()
    for count, row in enumerate(rows, start=1):  # noqa: B007  used after the loop
        if need_contexts and not row.has_own_context:
            without.append(row.id)
        if not faults and row.teacher is not None and row.teacher not in teachers:
            faults.append(
                f"row {row.id!r} names teacher {row.teacher!r}, the configuration has {', '.join(teachers)} "
                "(see `teachers`)"
            )
        yield row
    if without:
        faults.append(
            f"{len(without)} of {count} rows (the first is {without[0]!r}) have neither `context` nor "
            "`teacher_messages`: map one of them (data.columns), or set context.text for all rows"
        )
    if faults:
        raise DataError("\n".join(faults))
