"""The second stage of `opcd experience`: a pool of nested contexts from the items of successive problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.model import Config, ConfigError
from common.data.model_lookup import load_tokenizer
from common.data.rendering import SEPARATOR
from common.data.rows import read_rows
from learner.data.games import environment_error
from learner.experience.prompts import load_templates
from learner.experience.stage_files import EXTRACTED, POOL, experience_folder, read_stage, write_lines


def write_pool(config: Config) -> int:
    """Write the nested contexts of every series to ``pool.jsonl``; return their number.

    Raises ConfigError if there is no item, DataError for ``data.train``.
    """
    settings, folder = config.experience, experience_folder(config.run)
    lines = read_stage(folder / EXTRACTED, "extract")
    templates, tokenizer = load_templates(settings.templates), load_tokenizer(config.student.model)
    rows = read_rows(config.data.train, config.data, check=environment_error)
    # A raw prompt follows the context directly, so the context ends with a separator.
    ending = SEPARATOR if any(row.prompt is not None for row in rows) else ""
    pool: list[dict[str, Any]] = []
    for seed in sorted({line["seed"] for line in lines}):
        series = sorted((line for line in lines if line["seed"] == seed), key=lambda line: line["position"])
        for one in nest_contexts(
            [line["items"] for line in series],
            max_tokens=settings.max_context_tokens,
            render=lambda items: templates.context_text(items) + ending,
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        ):
            sizes = {"items": len(one.items), "dropped": one.dropped, "tokens": one.tokens}
            name = f"s{seed}-n{one.problems:03d}"
            pool.append({"id": name, "seed": seed, "problems": one.problems, **sizes, "text": one.text})
    if not pool:
        raise ConfigError(
            f"{folder / EXTRACTED}: no answer has a line `- EXPERIENCE ITEM: ...` that fits into "
            f"experience.max_context_tokens ({settings.max_context_tokens}); read the answers in the file, then change "
            "experience.templates or experience.model"
        )
    write_lines(folder / POOL, pool)
    return len(pool)


@dataclass(frozen=True, slots=True)
class NestedContext:
    """The context after some problems: items (oldest first), number of dropped items, text, tokens of the text."""

    problems: int
    items: tuple[str, ...]
    dropped: int
    text: str
    tokens: int


def nest_contexts(
    item_lists: Sequence[Sequence[str]],
    *,
    max_tokens: int,
    render: Callable[[tuple[str, ...]], str],
    count_tokens: Callable[[str], int],
) -> Iterator[NestedContext]:
    """Yield a context after each problem: the items of all lists so far, concatenated; nothing before the first item.

    Above `max_tokens` of the rendered text whole items are dropped, oldest first, and do not return.
    """
    kept: list[str] = []
    dropped = 0
    for problems, items in enumerate(item_lists, start=1):
        kept += items
        text = render(tuple(kept))
        while kept and (tokens := count_tokens(text)) > max_tokens:
            kept.pop(0)
            dropped += 1
            text = render(tuple(kept))
        if kept:
            yield NestedContext(problems, tuple(kept), dropped, text, tokens)
