"""The third stage of `opcd experience`: contexts of the pool, chosen at random or by accuracy on ``data.valid``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config.model import Config, ConfigError, ContextConfig, ExperienceConfig, RunConfig
from common.data.contexts import read_pool
from common.data.rows import read_rows
from common.telemetry.run_files import Progress, RunFiles
from learner.cluster.services import Services
from learner.data.games import first_turn
from learner.data.inputs import read_inputs
from learner.evaluation.evaluate import evaluate_rows
from learner.experience.stage_files import POOL, SCORES, SELECTED, StageFile, experience_folder, write_lines


def candidates(run: RunConfig, experience: ExperienceConfig) -> list[str]:
    """Return the ids of the contexts to try (`validation`) or to keep (`random`), in the order of the pool.

    Raises ConfigError without a pool.
    """
    ids = [line["id"] for line in _pool_lines(run)]
    count = experience.candidates if experience.select == "validation" else experience.keep
    return choose_random(ids, count, run.seed)


def context_of_pool(context: ContextConfig, pool: Path) -> ContextConfig:
    """Return `context` with its text replaced by the contexts of `pool`. Placement and template arguments stay."""
    return ContextConfig(pool=pool, placement=context.placement, chat_template_kwargs=context.chat_template_kwargs)


def write_selected(run: RunConfig, ids: Sequence[str]) -> None:
    """Write the contexts `ids` of the pool to ``selected.jsonl``, which has the pool's format."""
    lines = {line["id"]: line for line in _pool_lines(run)}
    write_lines(experience_folder(run) / SELECTED, [lines[context_id] for context_id in ids])


def choose_random(ids: Sequence[str], count: int | None, seed: int) -> list[str]:
    """Return `count` of `ids` (None: all) in their order."""
    if count is None or count >= len(ids):
        return list(ids)
    picked = np.random.default_rng(seed).choice(len(ids), size=count, replace=False)
    return [ids[index] for index in sorted(picked)]


def choose_best(accuracies: Mapping[str, float], count: int) -> list[str]:
    """Return the `count` ids of highest accuracy, best first; among equals the first in the mapping wins."""
    return sorted(accuracies, key=lambda one: -accuracies[one])[:count]


class Selection:
    """Tries contexts on ``data.valid``: an evaluation in context of all rows with each candidate."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError without ``data.valid`` or a pool."""
        if config.data.valid is None:
            raise ConfigError("experience.select is `validation` and data.valid is not set")
        self._candidates = candidates(config.run, config.experience)
        folder = experience_folder(config.run)
        self._config = config.model_copy(update={"context": context_of_pool(config.context, folder / POOL)})
        self._inputs = read_inputs(self._config)
        self._turns = [first_turn(row) for row in read_rows(config.data.valid, config.data, need_answers=True)]
        inputs = {
            "model": config.teacher_model,
            "pool": self._inputs.pool_digest,
            "valid": [turn.row.id for turn in self._turns],
            "eval": config.eval.model_dump(mode="json", include={"grader", "max_tokens", "samples", "temperature"}),
        }
        self._scores = StageFile(folder / SCORES, inputs)

    @property
    def done(self) -> bool:
        """True when every candidate has a score."""
        return set(self._candidates) <= self._accuracies().keys()

    async def run(self, services: Services, files: RunFiles, progress: Progress) -> None:
        """Evaluate the candidates that have no score yet."""
        sampler = self._inputs.context_sampler
        assert sampler is not None
        for name in self._candidates:
            scored = self._accuracies()
            if name in scored:
                continue
            progress.status(f"selecting: {len(scored)} of {len(self._candidates)} contexts")
            rows = [sampler.with_context(name, turn) for turn in self._turns]
            found = await evaluate_rows(services, self._config, self._inputs, rows, name, 0, files, True)
            self._scores.add([{"id": name, "accuracy": found.accuracy, "n": found.n, "ci95": list(found.ci95)}])
            low, high = found.ci95
            progress.line(f"{name:<12} {found.accuracy:.3f} ({low:.3f} to {high:.3f}, n = {found.n})")

    def keep(self) -> list[str]:
        """Write the best contexts to ``selected.jsonl``; return their ids."""
        accuracies = self._accuracies()
        kept = choose_best({name: accuracies[name] for name in self._candidates}, self._config.experience.keep or 1)
        write_selected(self._config.run, kept)
        return kept

    def close(self) -> None:
        """Close the file of scores."""
        self._scores.close()

    def _accuracies(self) -> dict[str, float]:
        return {line["id"]: line["accuracy"] for line in self._scores.rows}


def _pool_lines(run: RunConfig) -> list[dict[str, Any]]:
    path = experience_folder(run) / POOL
    if not path.exists():
        raise ConfigError(f"{path} is missing: run `opcd experience accumulate` first")
    read_pool(path)  # raises ConfigError for a bad line
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
