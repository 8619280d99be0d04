"""Which runs a comparison consists of: each method under each setting with each seed, all ordinary configurations.
Pure but for files that are looked at.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from common.config.loader import dump_config, load_config
from common.config.model import Config, ConfigError

Method = Literal["opcd", "offpolicy", "sequence", "pg", "in_context"]
Settings = tuple[str, ...]
"""Overrides, ``KEY=VALUE``, that a comparison varies."""
METHODS: tuple[Method, ...] = get_args(Method)
TITLES: dict[Method, str] = {
    "opcd": "on-policy context distillation",
    "offpolicy": "off-policy context distillation",
    "sequence": "sequence-level (NLL)",
    "pg": "sampled-token policy gradient",
    "in_context": "in context, not trained",
}


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One method with one seed. `config` is None where the configuration does not allow it: `fault` says why."""

    method: Method
    seed: int
    config: Config | None
    fault: str | None = None
    settings: Settings = ()

    @property
    def name(self) -> str:
        """Of the run, and of its log."""
        return "-".join([self.method, *_slugs(self.settings), str(self.seed)])

    @property
    def arm(self) -> str:
        """What its result is a row of: all seeds of one method under the same settings."""
        return " ".join([self.method, *self.settings])

    @property
    def title(self) -> str:
        """Of that row."""
        return ", ".join([TITLES[self.method], *self.settings])


def plan(
    path: str | Path,
    overrides: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    varied: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs, seed by seed, so that a comparison that is cut off has whole seeds.

    `varied` are ``KEY=VALUE,VALUE…``: every method is run with every combination of their values. `in_context` is no
    run of its own: every run measures it before its first step. Raises ConfigError for an unknown method, a repeated
    one or seed, nothing to train, or a configuration that is wrong by itself.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: valid are {', '.join(METHODS)}")
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{name}: each once, at least one; got {', '.join(map(str, values)) or 'none'}")
    trained = [method for method in METHODS if method in methods and method != "in_context"]
    if not trained:
        raise ConfigError("--methods in_context alone trains nothing: opcd evaluate CONFIG measures it")
    whole = load_config(path, overrides)
    if whole.data.eval is None:
        raise ConfigError("data.eval is not set: there is nothing to compare on")
    runs = [
        _planned(path, overrides, whole, method, settings, seed)
        for seed in seeds
        for method in trained
        for settings in _combinations(varied)
    ]
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError(f"--vary {' '.join(varied)}: two of the values would give runs of one name")
    return runs


def _combinations(varied: Sequence[str]) -> list[Settings]:
    """Every choice of one value for each key; raises ConfigError."""
    choices = []
    for text in varied:
        key, _, values = text.partition("=")
        listed = [value.strip() for value in values.split(",")]
        if not key or not all(listed):
            raise ConfigError(f"--vary {text!r}: KEY=VALUE,VALUE with a value between all commas")
        choices.append([f"{key.strip()}={value}" for value in listed])
    return list(itertools.product(*choices))


def _slugs(settings: Settings) -> list[str]:
    """For names of files: ``loss.top_k=16`` is ``top_k_16``."""
    pairs = (setting.partition("=") for setting in settings)
    return [re.sub(r"[^A-Za-z0-9.]+", "_", f"{key.split('.')[-1]}_{value}") for key, _, value in pairs]


def _key(setting: str) -> str:
    return setting.partition("=")[0]


def root_of(config: Config) -> Path:
    """Folder of a comparison: beside the run of the same configuration."""
    return config.run.dir / f"{config.run.name}-compare"


def _planned(
    path: str | Path, overrides: Sequence[str], whole: Config, method: Method, settings: Settings, seed: int
) -> PlannedRun:
    run = PlannedRun(method, seed, None, settings=settings)
    root = root_of(whole)
    identity = [f"run.dir={root}", f"run.name={run.name}", f"run.seed={seed}"]
    answers = root / "answers" / f"{'-'.join([*_slugs(settings), f'seed-{seed}'])}.jsonl"
    try:
        varied = load_config(path, [*overrides, *settings])
        keys = _keys(varied, method, answers)
        own = {_key(setting) for setting in settings} & {_key(setting) for setting in (*keys, *identity)}
        if own:  # its value would stand in the table and not be what was run
            return replace(run, fault=f"--vary: {method} sets {', '.join(sorted(own))} itself")
        return replace(run, config=load_config(path, [*overrides, *settings, *keys, *identity]))
    except ConfigError as error:
        return replace(run, fault=str(error))


def _keys(config: Config, method: Method, answers: Path) -> list[str]:
    """What makes a run of `config` one of `method`; batch, steps, optimiser and sampling stay."""
    own = ["rollout.source=student", "rollout.answers_file=null"]
    if method == "opcd":
        return own
    if method == "pg":
        return [
            *own,
            "loss.form=policy_gradient",
            "loss.importance_clip=null",
            f"loss.temperature={config.rollout.temperature}",
        ]
    keys = [
        "rollout.source=teacher",
        # Off-policy and sequence-level learn from the very same answers.
        f"rollout.answers_file={answers}",
        "rollout.max_staleness=0",
        "rollout.oversample_fraction=0",
        "loss.importance_clip=null",
    ]
    if config.teacher.kind == "base":  # the learner scores, at ids of its own choice
        keys += ["rollout.topk_from=learner", "loss.support=student"]
    else:
        keys += ["rollout.topk_from=engine", "loss.support=teacher"]
    return [*keys, "loss.form=nll"] if method == "sequence" else [*keys, "loss.direction=forward"]


def is_finished(run: PlannedRun) -> bool:
    """Whether the run has come to its end under the very configuration that is planned."""
    if run.config is None:
        return False
    summary = run.config.run.path / "summary.json"
    return (
        summary.is_file()
        and json.loads(summary.read_text(encoding="utf-8"))["outcome"] == "finished"
        and _was_run_as(run.config)
    )


def can_resume(run: PlannedRun) -> bool:
    """Whether the run was cut off with a checkpoint, under the very configuration that is planned."""
    if run.config is None:
        return False
    return any(run.config.run.path.glob("checkpoints/step-*/manifest.json")) and _was_run_as(run.config)


def _was_run_as(config: Config) -> bool:
    written = config.run.path / "config.yaml"
    return written.is_file() and written.read_text(encoding="utf-8") == dump_config(config)
