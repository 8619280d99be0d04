"""``opcd chat``: ask a finished run questions, in the terminal or through a pipe."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.cli.errors import known_errors

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.inspect.chat import Conversation


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/demo.")],
    prompt: Annotated[
        str | None, typer.Option(help="One question; default: one question a line of standard input.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Folder in the run that holds the student; default: checkpoint, else best.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Id in context.pool, or of a row with its own context; default: the first.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: the limit of the run's evaluation.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    one_at_a_time: Annotated[
        bool, typer.Option("--one-at-a-time", help="Hold one model in memory at a time, even if both would fit.")
    ] = False,
) -> None:
    """Ask the base model, the base model with the context, and the distilled student.

    Each line of standard input is a question. If the run's prompts are raw text, \\n in a question is a line end.
    Ctrl-D ends the program.
    """
    from common.config.model import ConfigError
    from common.data.rows import DataError
    from deploy.inspect.chat import ChatError

    with known_errors(ChatError, ConfigError, DataError):
        talk = open_conversation(run, weights, context, max_tokens, temperature, one_at_a_time)
    from rich.console import Console

    console = Console(soft_wrap=True)
    failed = False
    for text in questions(prompt, talk):
        try:
            say(console, talk, text, alone=prompt is not None)
        except DataError as error:  # this question cannot be rendered; the next one may be
            typer.echo(f"opcd: {error}", err=True)
            failed = True
    if failed and prompt is not None:
        raise typer.Exit(2)


def open_conversation(
    run: Path, weights: str | None, context: str | None, max_tokens: int | None, temperature: float, one_at_a_time: bool
) -> Conversation:
    """Return a conversation with the models of `run`. Raises ChatError, ConfigError or DataError."""
    from deploy.cli.inspect import context_text, find_row
    from deploy.inspect.chat import Conversation, Decoding, find_weights, read_config

    config = read_config(run)
    student = find_weights(run, weights)
    device, own = _device(), config.context.from_rows
    return Conversation(
        config=config,
        student=student,
        context=context_text(config.context, None if own else context),
        own_context=find_row(config, context).context if own else None,
        decoding=Decoding(
            max_tokens or config.eval.max_tokens or config.rollout.max_tokens, temperature, config.rollout.stop
        ),
        keep_both=not one_at_a_time and _both_fit(Path(config.student.model), student, device),
        device=device,
    )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _both_fit(base: Path, student: Path, device: str) -> bool:
    """Return True if the weights of both models take at most half of the free memory."""
    import torch

    from common.sizing.machine import available_memory_bytes
    from deploy.inspect.chat import weight_bytes

    free = available_memory_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
    return 2 * (weight_bytes(base) + weight_bytes(student)) <= free


def questions(prompt: str | None, talk: Conversation) -> Iterator[str]:
    """Yield `prompt`, or the lines of standard input that are not blank."""
    if prompt is not None:
        yield line_ends(prompt) if talk.raw else prompt
        return
    lines = _typed(talk) if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin)
    for line in lines:
        if line.strip():
            yield line_ends(line) if talk.raw else line


def line_ends(text: str) -> str:
    """Replace a typed ``\\n`` with a line end and ``\\\\`` with a backslash."""
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")


def _typed(talk: Conversation) -> Iterable[str]:
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # gives input() line editing and a history
    kind = "raw text, \\n is a line end" if talk.raw else "one user turn per line"
    typer.echo(f"{talk.student}: {kind}; Ctrl-D ends", err=True)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo("", err=True)
            return


def say(console: Console, talk: Conversation, text: str, *, alone: bool) -> None:
    """Print the answers: side by side on a terminal, one below the other otherwise."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        if not alone:
            console.print(Text(f"> {text}"))
        for voice, answer in talk.ask(text):
            console.print(Text(f"{voice}: {answer.strip()}"))
        console.print()
        return
    with console.status("asking"):
        answers = dict(talk.ask(text))
    table = Table(expand=True)
    for voice in answers:
        table.add_column(voice, ratio=1, overflow="fold")
    table.add_row(*(Text(answer.strip()) for answer in answers.values()))
    console.print(table)
