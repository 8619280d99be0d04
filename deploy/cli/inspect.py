"""``opcd inspect``: a row as both sides see it, in the terminal."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.cli.errors import known_errors

if TYPE_CHECKING:
    from rich.console import Console

    from common.config.model import Config
    from common.data.rows import Row
    from deploy.inspect.inspection import Seen, SeenToken

MOST_TOKENS = 40
"""Of a run of tokens of one kind that are shown without ``--all``."""

STYLES = {"context": "yellow", "prompt": "", "response": "cyan"}


def inspect(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides.")] = None,
    row: Annotated[str | None, typer.Option(help="Its id; default: the first row of data.train.")] = None,
    context: Annotated[str | None, typer.Option(help="Of context.pool: an id; default: the pool's first.")] = None,
    response: Annotated[str | None, typer.Option(help="Text behind the prompt; default: the row's answer.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every token of long contexts and prompts.")] = False,
) -> None:
    """What the student and the teacher see of a row, token by token. Needs the tokenizer, no engine."""
    from common.config.loader import load_config
    from common.config.model import ConfigError
    from common.data.rows import DataError

    with known_errors(ConfigError, DataError):
        kept = Path(config) / "config.yaml"
        resolved = load_config(str(kept) if kept.is_file() else config, overrides or ())
        seen = _seen(resolved, row, context, response)
    from rich.console import Console

    show(Console(), seen, resolved, MOST_TOKENS if not everything else None)


def _seen(config: Config, row_id: str | None, context_id: str | None, response: str | None) -> Seen:
    from common.data.rendering import Renderer, load_tokenizer
    from deploy.inspect.inspection import inspect_row

    row = find_row(config, row_id)
    tokenizer = load_tokenizer(config.student.model)
    renderer = Renderer(tokenizer, context_text(config, context_id), config.student, config.context.placement)
    prompt = renderer.render(row)
    text = response if response is not None else row.answer or ""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return inspect_row(tokenizer, prompt, renderer.contexts, ids, config.loss.skip_first_tokens)


def find_row(config: Config, row_id: str | None) -> Row:
    """A row of any of the run's sets; the first one to train on without an id. Raises DataError where there is none."""
    from common.data.rows import DataError, read_rows

    known: list[str] = []
    for source in (config.data.train, config.data.valid, config.data.eval):
        for row in [] if source is None else read_rows(source, config.data):
            if row_id is None or row.id == row_id:
                return _not_played(row)
            known.append(row.id)
    close = difflib.get_close_matches(str(row_id), known, n=1)
    raise DataError(f"no row {row_id!r} in train, valid or eval{f'; did you mean {close[0]!r}?' if close else ''}")


def _not_played(row: Row) -> Row:
    from common.data.rows import DataError

    if row.environment is not None:
        raise DataError(f"row {row.id!r} is a game: its prompts are what the environment says while it is played")
    return row


def context_text(config: Config, context_id: str | None) -> str:
    """The run's context; of a pool the one named, or the first. Raises ConfigError where it is not there."""
    from common.config.model import ConfigError
    from common.data.contexts import read_pool

    if config.context.pool is None:
        if context_id is not None:
            raise ConfigError("--context names one of context.pool, and this run has a single context")
        return config.context.read()
    pool = {one.id: one.text for one in read_pool(Path(config.context.pool))}
    if context_id is None:
        return next(iter(pool.values()))
    if context_id not in pool:
        close = difflib.get_close_matches(context_id, pool, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"no context {context_id!r} in {config.context.pool}{hint}")
    return pool[context_id]


# --- the terminal -----------------------------------------------------------------------------------------------------


def show(console: Console, seen: Seen, config: Config, most: int | None) -> None:
    """Facts, the tokens, then whatever is suspicious."""
    from rich.text import Text

    for name, value in facts(seen, config.rollout.max_tokens):
        console.print(Text.assemble((f"{name:<24}", "bold"), value))
    console.print(_table(seen.tokens, most))
    for warning in seen.warnings():
        console.print(Text(f"warning: {warning}", "red"))


def facts(seen: Seen, max_tokens: int) -> list[tuple[str, str]]:
    """What can be said of the row in a line each."""
    apart = seen.teacher_tokens - seen.equal_tokens
    own = seen.student_tokens - seen.equal_tokens
    bos = (
        "the tokenizer has none"
        if seen.bos is None
        else f"{seen.bos[0]} for the student, {seen.bos[1]} for the teacher"
    )
    return [
        ("row", seen.row_id),
        (
            "student's prompt",
            f"{seen.student_tokens} tokens, {seen.student_tokens + max_tokens} with the longest answer",
        ),
        (
            "teacher's prompt",
            f"{seen.teacher_tokens} tokens, {seen.context_tokens} of them the shared context, "
            f"{seen.teacher_tokens + max_tokens} with the longest answer",
        ),
        ("prompts become equal", f"from token {apart} (teacher) and {own} (student), {seen.equal_tokens} tokens"),
        ("BOS", bos),
        ("response", "the given text as tokens; in a run, the very tokens that the student sampled"),
    ]


def _table(tokens: Sequence[SeenToken], most: int | None) -> Any:
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
    for one in shortened(tokens, most or len(tokens)):
        if isinstance(one, int):
            table.add_row("…", "…", "", "", "", Text(f"{one} more like these (--all)", "dim"))
            continue
        # Text, not str: a piece may look like markup.
        cells = (
            _place(one.teacher),
            _place(one.student),
            one.role,
            "x" if one.counted else "",
            str(one.id),
            repr(one.piece),
        )
        table.add_row(*(Text(cell, STYLES[one.role]) for cell in cells))
    return table


def _place(place: int | None) -> str:
    return "-" if place is None else str(place)
