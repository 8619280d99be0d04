"""Loads a simulation from a measured run, a ``simulation:`` file or a run's configuration, and overrides.

Later sources win: the measured run, then the file, then ``key=value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config.loader import load_config, read_tree, validate
from common.config.model import Config, ConfigError
from deploy.simulator.config import SimulationConfig
from deploy.simulator.fit import Fit, fitted, sizes, spread_of
from deploy.simulator.run import Measured, measured

SECTION = "simulation"


def load_simulation(path: str | Path, overrides: Sequence[str] = (), measured_run: Path | None = None) -> Fit:
    """Load the simulation of `path`, with notes on assumptions.

    `path` is a file with the section ``simulation:``, or a run's configuration: that gives the sizes, and
    `measured_run` gives the speeds. Overrides are ``simulation.KEY=VALUE``, or keys of the run's configuration.
    Raises ConfigError.
    """
    own = [override for override in overrides if override.startswith(f"{SECTION}.")]
    others = [override for override in overrides if override not in own]
    asked = read_tree(path, own)
    simulation = asked.pop(SECTION, {})
    if not isinstance(simulation, dict):
        raise ConfigError(f"{path}: {SECTION} must be a section, not a value")
    base: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if measured_run is not None:
        run = measured(measured_run)
        found = fitted(run)
        base, notes = found.simulation.model_dump(), found.notes
        if asked:
            config = load_config(path, others)
            base, more = _with_sizes_of(config, run, base)
            notes += more
    elif asked or others:
        raise ConfigError(
            f"{path} gives sizes but no speeds: name a measured run (--from), or a file with the section `{SECTION}:`"
        )
    return Fit(validate(SimulationConfig, _merged(base, simulation)), notes)


def _with_sizes_of(config: Config, run: Measured, base: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`base` with the sizes of `config`, and notes on assumptions."""
    rollout, learner = config.rollout, config.learner
    change: dict[str, Any] = {
        **sizes(config),
        "rollout": {"workers": rollout.workers, "concurrency": min(rollout.concurrency, rollout.max_num_seqs)},
        "teacher": {
            "batch_tokens": config.teacher.batch_tokens,
            "window_s": config.teacher.batch_window_ms / 1000,
        },
        "learner": {
            "ranks": learner.ranks,
            "micro_batch_tokens": learner.micro_batch_tokens,
            "packed": learner.packing != "off",
        },
    }
    notes: tuple[str, ...] = ()
    before, after = run.config.rollout.max_tokens, rollout.max_tokens
    if before != after:
        change["rollout"]["answer_tokens"] = spread_of(_other_limit(run, before, after)).model_dump()
        notes = (
            f"rollout.max_tokens was {before} in the measured run and is {after} now: answers of {before} tokens are "
            f"assumed to have {after}, other answers keep their length, cut at {after}",
        )
    return _merged(base, change), notes


def _other_limit(run: Measured, before: int, after: int) -> list[int]:
    """Lengths of the run's answers under a limit of `after` tokens instead of `before`."""
    lengths = [answer.response_tokens for answer in run.answers]
    return [after if tokens == before else min(tokens, after) for tokens in lengths]


def _merged(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Merge `change` into `tree` by section; a distribution of another kind replaces the whole section."""
    merged = dict(tree)
    for key, value in change.items():
        before = merged.get(key)
        same = isinstance(value, dict) and isinstance(before, dict) and value.get("kind") in (None, before.get("kind"))
        merged[key] = _merged(before, value) if same and before is not None else value
    return merged
