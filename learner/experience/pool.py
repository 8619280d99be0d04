"""The later stages of `opcd experience`: a pool of nested contexts, the choice of some, the run that distils them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from common.config.model import Config, ConfigError, ContextConfig
from common.data.contexts import read_pool
from common.data.rendering import SEPARATOR, load_tokenizer
from common.data.rows import read_rows
from common.evaluation.accuracy import Accuracy
from common.telemetry.run_files import Progress, RunFiles
from learner.data.games import environment_error, first_turn
from learner.data.inputs import read_inputs
from learner.evaluation.evaluate import EvaluationServices, evaluate_rows
from learner.experience.accumulate import accumulate
from learner.experience.choose import at_random, best
from learner.experience.extract import EXTRACTED, folder
from learner.experience.stage_file import StageFile, read_stage, write_lines
from learner.experience.templates import load_templates

POOL, SCORES, SELECTED = "pool.jsonl", "scores.jsonl", "selected.jsonl"

# --- accumulate -------------------------------------------------------------------------------------------------------


def write_pool(config: Config) -> int:
    """Nested contexts of every series into ``pool.jsonl``; how many.

    Raises ConfigError where there is no item, DataError for ``data.train``.
    """
    settings = config.experience
    lines = read_stage(folder(config) / EXTRACTED, "extract")
    templates, tokenizer = load_templates(settings.templates), load_tokenizer(config.student.model)
    rows = read_rows(config.data.train, config.data, check=environment_error)
    behind = SEPARATOR if any(row.prompt is not None for row in rows) else ""  # raw text begins where the context ends
    pool: list[dict[str, Any]] = []
    for seed in sorted({line["seed"] for line in lines}):
        series = sorted((line for line in lines if line["seed"] == seed), key=lambda line: line["place"])
        for one in accumulate(
            [line["items"] for line in series],
            max_tokens=settings.max_context_tokens,
            render=lambda items: templates.experience(items) + behind,
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        ):
            sizes = {"items": len(one.items), "dropped": one.dropped, "tokens": one.tokens}
            name = f"s{seed}-n{one.problems:03d}"
            pool.append({"id": name, "seed": seed, "problems": one.problems, **sizes, "text": one.text})
    if not pool:
        raise ConfigError(
            f"{folder(config) / EXTRACTED}: no answer has a line `- EXPERIENCE ITEM: ...` that fits into "
            f"experience.max_context_tokens ({settings.max_context_tokens}); see the answers there, then change "
            "experience.templates or experience.model"
        )
    write_lines(folder(config) / POOL, pool)
    return len(pool)


# --- select -----------------------------------------------------------------------------------------------------------


def candidates(config: Config) -> list[str]:
    """Ids of the contexts that are tried, or kept, in the order of the pool. Raises ConfigError without a pool."""
    settings = config.experience
    ids = [one["id"] for one in _pool_lines(config)]
    count = settings.candidates if settings.select == "validation" else settings.keep
    return at_random(ids, count, config.run.seed)


def write_selected(config: Config, chosen: Sequence[str]) -> None:
    """The chosen contexts into ``selected.jsonl``, a pool like the one that they are from."""
    lines = {line["id"]: line for line in _pool_lines(config)}
    write_lines(folder(config) / SELECTED, [lines[name] for name in chosen])


class Selection:
    """Tries contexts on ``data.valid``: each row once under each, as an evaluation in context."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError without ``data.valid`` or a pool."""
        if config.data.valid is None:
            raise ConfigError("experience.select is `validation` and data.valid is not set")
        self._names = candidates(config)
        pool = folder(config) / POOL
        self._config = config.model_copy(
            update={"context": ContextConfig(pool=pool, placement=config.context.placement)}
        )
        self._inputs = read_inputs(self._config)
        self._turns = [first_turn(row) for row in read_rows(config.data.valid, config.data, need_answers=True)]
        made_of = {
            "model": config.teacher_model,
            "pool": self._inputs.pool_digest,
            "valid": [turn.row.id for turn in self._turns],
            "eval": config.eval.model_dump(mode="json", include={"grader", "max_tokens", "samples", "temperature"}),
        }
        self._scores = StageFile(folder(config) / SCORES, made_of)

    @property
    def done(self) -> bool:
        """Whether every candidate was tried."""
        return set(self._names) <= {line["id"] for line in self._scores.rows}

    async def run(self, services: EvaluationServices, files: RunFiles, progress: Progress) -> None:
        """Try what was not tried yet."""
        done = {line["id"]: line["accuracy"] for line in self._scores.rows}
        draw = self._inputs.context_sampler
        assert draw is not None
        for name in self._names:
            if name in done:
                continue
            progress.status(f"selecting: {len(done)} of {len(self._names)} contexts")
            rows = [draw.with_context(name, turn) for turn in self._turns]
            found = await evaluate_rows(services, self._config, self._inputs, rows, name, 0, files, True)
            self._scores.add([{"id": name, "accuracy": found.accuracy, "n": found.n, "ci95": list(found.ci95)}])
            done[name] = found.accuracy
            progress.line(_score_line(name, found))

    def keep(self) -> list[str]:
        """Keep the best, and say which."""
        scores = {line["id"]: line["accuracy"] for line in self._scores.rows}
        kept = best({name: scores[name] for name in self._names}, self._config.experience.keep or 1)
        write_selected(self._config, kept)
        return kept

    def close(self) -> None:
        """Let go of the file."""
        self._scores.close()


def _score_line(name: str, found: Accuracy) -> str:
    low, high = found.ci95
    return f"{name:<12} {found.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {found.n})"


def _pool_lines(config: Config) -> list[dict[str, Any]]:
    path = folder(config) / POOL
    if not path.exists():
        raise ConfigError(f"{path} is not there: run `opcd experience accumulate` first")
    read_pool(path)  # which says what is wrong with it
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


# --- consolidate ------------------------------------------------------------------------------------------------------


def consolidation_of(config: Config) -> Config:
    """The ordinary run that distils the selected contexts. Raises ConfigError where nothing is selected yet."""
    selected = folder(config) / SELECTED
    if not selected.exists():
        raise ConfigError(f"{selected} is not there: run `opcd experience select` first")
    return config.model_copy(update={"context": ContextConfig(pool=selected, placement=config.context.placement)})
