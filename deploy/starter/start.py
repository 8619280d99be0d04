"""Settings of a new run, derived from its model, context and rows, and the commented file that holds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from jinja2 import Environment, StrictUndefined

from common.config.model import ConfigError, ContextConfig, DataConfig, StudentConfig
from common.data.model_lookup import load_tokenizer, model_limit
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Row, read_rows
from common.data.sources import read_records
from common.data.turns import looks_like_turns

ChatPlacement = Literal["user_prefix", "turns"] | None
"""``context.placement`` of chat rows."""
MAX_BATCH = 32
LONG_ANSWER = 256
"""Limit of tokens for answers of unknown length."""
TRIED_ROWS = 32
"""Rows rendered to find the context's placement and the room for answers."""


@dataclass(frozen=True)
class Start:
    """Values for a new configuration file. The defaults are ``deploy/configs/own.yaml``."""

    file: str = "own.yaml"
    name: str = "own"
    model: str = "models/smollm2"
    context: str = "context.txt"
    train: str = "train.jsonl"
    eval: str | None = "eval.jsonl"
    messages_in_prompt: bool = False
    placement: ChatPlacement = None
    batch_size: int = MAX_BATCH
    max_tokens: int = LONG_ANSWER
    stop: bool = False
    grader: Literal["contains", "exact"] = "contains"
    gpus: int = 0


def start_text(start: Start) -> str:
    """The commented configuration."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["yaml"] = _yaml_scalar
    template = files("deploy.starter").joinpath("template.yaml").read_text(encoding="utf-8")
    return environment.from_string(template).render(asdict(start))


def _yaml_scalar(text: str) -> str:
    """`text` as a YAML value on one line, quoted where YAML would read something else."""
    return str(yaml.safe_dump(text, allow_unicode=True, width=10**9).removesuffix("...\n").strip())


def fitting_start(
    *, file: Path, model: str, context: Path, train: Path, held_out: Path | None, gpus: int, here: bool
) -> Start:
    """Settings that fit. `here`: the model is on this machine, so rows can be rendered.

    Raises ConfigError or DataError for a context, model or rows that no run could use.
    """
    in_prompt = _messages_in_prompt(train)
    data = DataConfig(train=train, columns={"messages": "prompt"} if in_prompt else {})
    rows = read_rows(train, data)
    graded = [] if held_out is None else read_rows(held_out, data, need_answers=True)
    single_lines = _single_lines([*rows, *graded])
    text = ContextConfig(file=context).read()
    placement: ChatPlacement = None
    limit = LONG_ANSWER
    if here and rows[0].environment is None:
        placement, limit = _placement_and_room(model, text, rows[:TRIED_ROWS])
    answer_tokens = _answer_tokens(model, graded) if here and single_lines else LONG_ANSWER
    return Start(
        file=str(file),
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "own",
        model=model,
        context=str(context),
        train=str(train),
        eval=None if held_out is None else str(held_out),
        messages_in_prompt=in_prompt,
        placement=placement,
        batch_size=min(MAX_BATCH, len(rows)),
        max_tokens=min(answer_tokens, limit),
        stop=single_lines,
        grader="exact" if single_lines else "contains",
        gpus=gpus,
    )


def _messages_in_prompt(source: Path) -> bool:
    """True for rows whose `prompt` is a list of messages, as TRL has them."""
    _, record = next(iter(read_records(source)), ("", None))
    return isinstance(record, dict) and isinstance(record.get("prompt"), list)


def _single_lines(rows: Sequence[Row]) -> bool:
    """True if prompts are raw text and all known answers are single lines, so that a newline ends an answer."""
    answers = [row.answer for row in rows if row.answer is not None]
    return bool(answers) and all(row.prompt is not None for row in rows) and not any("\n" in one for one in answers)


def _placement_and_room(model: str, context: str, rows: Sequence[Row]) -> tuple[ChatPlacement, int]:
    """The placement that context and chat template need, and the tokens that the model leaves for an answer."""
    placements: tuple[ChatPlacement, ...] = (None, "user_prefix") if rows[0].messages else (None,)
    if rows[0].messages and looks_like_turns(context):
        placements = ("turns",)
    faults = []
    for placement in placements:
        try:
            longest = _longest_prompt(model, context, rows, placement)
        except DataError as fault:
            faults.append(fault)
            continue
        limit = model_limit(model) or longest + LONG_ANSWER
        if limit <= longest:
            raise ConfigError(
                f"{model} takes {limit} tokens, and the longest prompt with the context has {longest}: shorten the "
                "context or take a model for longer sequences"
            )
        return placement, min(limit - longest, LONG_ANSWER)
    raise faults[0]


def _longest_prompt(model: str, context: str, rows: Sequence[Row], placement: ChatPlacement) -> int:
    renderer = Renderer(load_tokenizer(model), context, StudentConfig(model=model), placement)
    return max(len(teacher_sequence(renderer.render(row), renderer.contexts)) for row in rows)


def _answer_tokens(model: str, rows: Sequence[Row]) -> int:
    """Twice the longest known answer, so that a wrong one of another length ends too."""
    tokenizer = load_tokenizer(model)
    answers = [f" {row.answer}" for row in rows if row.answer is not None]
    longest = max((len(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in answers), default=0)
    return 2 * longest + 4 if longest else LONG_ANSWER
