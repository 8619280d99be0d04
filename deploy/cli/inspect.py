"""``opcd inspect``: one row's tokens on the student's and the teacher's side."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.cli.errors import known_errors

if TYPE_CHECKING:
    from rich.console import Console

    from common.config.inputs import ContextConfig
    from common.config.model import Config
    from common.data.rows import Row
    from deploy.inspect.inspection import InspectedRow, InspectedToken

MAX_TOKENS = 40
"""Tokens printed of each group of like tokens, without ``--all``."""

STYLES = {"context": "yellow", "prompt": "", "response": "cyan"}


def inspect(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file or a run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides.")] = None,
    row: Annotated[str | None, typer.Option(help="Id of the row; default: the first row of data.train.")] = None,
    context: Annotated[str | None, typer.Option(help="Id in context.pool; default: the pool's first context.")] = None,
    response: Annotated[str | None, typer.Option(help="Text after the prompt; default: the row's answer.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every token of long contexts and prompts.")] = False,
) -> None:
    """Print a row as the student and the teacher see it, token by token, then the findings of the dry run's checks.

    Needs the tokenizer, no engine. The exit status is 2 if a run would be refused.
    """
    from common.config.loader import load_config
    from common.config.model import ConfigError
    from common.data.rows import DataError

    with known_errors(ConfigError, DataError):
        run_config = Path(config) / "config.yaml"
        resolved = load_config(str(run_config) if run_config.is_file() else config, overrides or ())
        inspected = _inspect(resolved, row, context, response)
    from rich.console import Console

    show(Console(), inspected, resolved.rollout.max_tokens, None if everything else MAX_TOKENS)
    from learner.preflight.checks import preflight

    report = preflight(resolved, offline=True, every_row=False)
    for text in report.texts("warning"):
        typer.echo(f"warning: {text}", err=True)
    with known_errors(ConfigError):
        report.raise_errors()


def _inspect(config: Config, row_id: str | None, context_id: str | None, response: str | None) -> InspectedRow:
    from common.data.model_lookup import load_tokenizer
    from common.data.rendering import Renderer
    from common.data.special_tokens import control_tokens
    from deploy.inspect.inspection import inspect_row

    row = find_row(config, row_id)
    tokenizer = load_tokenizer(config.student.model)
    renderer = Renderer(
        tokenizer,
        context_text(config.context, context_id),
        config.student,
        config.context.placement,
        teacher_template_kwargs=config.context.chat_template_kwargs,
    )
    prompt = renderer.render(row)
    text = response if response is not None else row.answer or ""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    inspected = inspect_row(tokenizer, prompt, renderer.contexts, ids, config.loss.skip_first_tokens)
    return replace(inspected, control_token=control_tokens(tokenizer, [row]).get(row.id))


def find_row(config: Config, row_id: str | None) -> Row:
    """Find a row in data.train, data.valid or data.eval by its id; None means the first row of data.train.

    Raises DataError for an unknown id and for a row of a game.
    """
    from common.data.rows import DataError, read_rows

    known: list[str] = []
    data = config.data
    for source in (data.train, data.valid, data.eval):
        for row in [] if source is None else read_rows(source, data, own_contexts=config.context.from_rows):
            if row_id is None or row.id == row_id:
                if row.environment is not None:
                    raise DataError(f"row {row.id!r} is a game: the environment makes its prompts while it is played")
                return row
            known.append(row.id)
    close = difflib.get_close_matches(str(row_id), known, n=1)
    raise DataError(f"no row {row_id!r} in train, valid or eval{f'; did you mean {close[0]!r}?' if close else ''}")


def context_text(config: ContextConfig, context_id: str | None) -> str:
    """Return the run's context; from a pool, the one with that id, or the first; empty if only rows have contexts.

    Raises ConfigError.
    """
    from common.config.model import ConfigError
    from common.data.contexts import read_pool

    if config.pool is None:
        if context_id is not None:
            kind = "one context per row (--row)" if config.from_rows else "a single context"
            raise ConfigError(f"--context needs context.pool, and this run has {kind}")
        return config.read()
    pool = {context.id: context.text for context in read_pool(Path(config.pool))}
    if context_id is None:
        return next(iter(pool.values()))
    if context_id not in pool:
        close = difflib.get_close_matches(context_id, pool, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no context {context_id!r} in {config.pool}{hint}")
    return pool[context_id]


def show(console: Console, inspected: InspectedRow, max_answer_tokens: int, max_tokens: int | None) -> None:
    """Print the facts, the table of tokens and the warnings; at most `max_tokens` of each group of like tokens."""
    from rich.text import Text

    for name, value in facts(inspected, max_answer_tokens):
        console.print(Text.assemble((f"{name:<24}", "bold"), value))
    console.print(_table(inspected.tokens, max_tokens))
    for warning in inspected.warnings():
        console.print(Text(f"warning: {warning}", "red"))


def facts(row: InspectedRow, max_answer_tokens: int) -> list[tuple[str, str]]:
    """Return the row's lengths and boundaries as (name, text)."""
    context = "the row's own context" if row.own_context else "the shared context"
    teacher_only = row.teacher_tokens - row.equal_tokens
    student_only = row.student_tokens - row.equal_tokens
    bos = "the tokenizer has none" if row.bos is None else f"{row.bos[0]} for the student, {row.bos[1]} for the teacher"
    return [
        ("row", row.row_id),
        (
            "student's prompt",
            f"{row.student_tokens} tokens, {row.student_tokens + max_answer_tokens} with the longest answer",
        ),
        (
            "teacher's prompt",
            f"{row.teacher_tokens} tokens, {row.context_tokens} of them {context}, "
            f"{row.teacher_tokens + max_answer_tokens} with the longest answer",
        ),
        (
            "prompts become equal",
            f"from token {teacher_only} (teacher) and {student_only} (student), {row.equal_tokens} tokens",
        ),
        ("BOS", bos),
        ("response", "the given text as tokens; a run uses the token ids that the student sampled"),
    ]


def _table(tokens: Sequence[InspectedToken], max_tokens: int | None) -> Any:
    from rich.table import Table
    from rich.text import Text

    from deploy.inspect.inspection import shortened

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("teacher", "student"):
        table.add_column(name, justify="right")
    table.add_column("role")
    table.add_column("loss")
    table.add_column("id", justify="right")
    table.add_column("piece", overflow="fold")
    for token in shortened(tokens, max_tokens or len(tokens)):
        if isinstance(token, int):
            table.add_row("…", "…", "", "", "", Text(f"{token} more like these (--all)", "dim"))
            continue
        positions = ["-" if position is None else str(position) for position in (token.teacher, token.student)]
        cells = (*positions, token.role, "x" if token.counted else "", str(token.id), repr(token.piece))
        # Text, because rich would read markup in a plain string.
        table.add_row(*(Text(cell, STYLES[token.role]) for cell in cells))
    return table
