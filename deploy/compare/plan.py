"""Plans the runs of a comparison: each method under each setting with each seed, as ordinary configurations."""

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
"""Overrides ``KEY=VALUE`` that a comparison varies."""
METHODS: tuple[Method, ...] = get_args(Method)
NO_REWARD = ("loss.reward_weight=0", "loss.reward=null")
TITLES: dict[Method, str] = {
    "opcd": "on-policy context distillation",
    "offpolicy": "off-policy context distillation",
    "sequence": "sequence-level (NLL)",
    "pg": "sampled-token policy gradient",
    "in_context": "in context, not trained",
}


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One method with one seed. `config` is None if the configuration does not allow the method: `fault` states why."""

    method: Method
    seed: int
    config: Config | None
    fault: str | None = None
    settings: Settings = ()

    @property
    def name(self) -> str:
        """Name of the run and of its log."""
        return "-".join([self.method, *_slugs(self.settings), str(self.seed)])

    @property
    def arm(self) -> str:
        """Name of the run's row in the result: all seeds of one method under the same settings."""
        return " ".join([self.method, *self.settings])

    @property
    def title(self) -> str:
        """Title of that row."""
        return ", ".join([TITLES[self.method], *self.settings])


def plan(
    path: str | Path,
    overrides: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    varied: Sequence[str] = (),
) -> list[PlannedRun]:
    """All runs, seed by seed, so that an interrupted comparison has complete seeds.

    `varied` are ``KEY=VALUE,VALUE…``: every method runs with every combination of the values. `in_context` needs no
    run: every run measures it before its first step. Raises ConfigError for an unknown or repeated method, a repeated
    seed, nothing to train, or an invalid configuration.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: valid are {', '.join(METHODS)}")
    for name, values in (("methods", methods), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ConfigError(f"--{name}: name at least one, each once; got {', '.join(map(str, values)) or 'none'}")
    trained = [method for method in METHODS if method in methods and method != "in_context"]
    if not trained:
        raise ConfigError("--methods in_context alone trains nothing; use opcd evaluate CONFIG")
    whole = load_config(path, overrides)
    if whole.data.eval is None:
        raise ConfigError("data.eval is not set; a comparison needs held-out rows")
    runs = [
        _planned(path, overrides, whole, method, settings, seed)
        for seed in seeds
        for method in trained
        for settings in _combinations(varied)
    ]
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError(f"--vary {' '.join(varied)}: two combinations give runs of the same name; rename one value")
    return runs


def _combinations(varied: Sequence[str]) -> list[Settings]:
    """All combinations of one value for each key. Raises ConfigError."""
    choices = []
    for text in varied:
        key, _, values = text.partition("=")
        listed = [value.strip() for value in values.split(",")]
        if not key or not all(listed):
            raise ConfigError(f"--vary {text!r}: expected KEY=VALUE,VALUE without empty values")
        choices.append([f"{key.strip()}={value}" for value in listed])
    return list(itertools.product(*choices))


def _slugs(settings: Settings) -> list[str]:
    """Parts of file names: ``top_k_16`` for ``loss.top_k=16``."""
    pairs = (setting.partition("=") for setting in settings)
    return [re.sub(r"[^A-Za-z0-9.]+", "_", f"{key.split('.')[-1]}_{value}") for key, _, value in pairs]


def _key(setting: str) -> str:
    return setting.partition("=")[0]


def root_of(config: Config) -> Path:
    """Folder of a comparison, next to that of the configuration's run."""
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
        replaced = {_key(setting) for setting in settings} & {_key(setting) for setting in (*keys, *identity)}
        if replaced:  # the table would name a value that the run does not have
            return replace(run, fault=f"--vary: {method} sets {', '.join(sorted(replaced))} itself")
        return replace(run, config=load_config(path, [*overrides, *settings, *keys, *identity]))
    except ConfigError as error:
        return replace(run, fault=str(error))


def _keys(config: Config, method: Method, answers: Path) -> list[str]:
    """Overrides that make a run of `config` one of `method`; batch, steps, optimiser and sampling stay."""
    on_policy = ["rollout.source=student", "rollout.answers_file=null"]
    if method == "opcd":
        return on_policy
    if method == "pg":
        return [
            *on_policy,
            "rollout.mix=null",
            "loss.form=policy_gradient",
            "loss.importance_clip=null",
            *NO_REWARD,
            "loss.clip_per_entry=null",
            f"loss.temperature={config.rollout.temperature}",
        ]
    keys = [
        "rollout.source=teacher",
        "rollout.mix=null",
        # Off-policy and sequence-level train on the same answers.
        f"rollout.answers_file={answers}",
        "rollout.max_staleness=0",
        "rollout.oversample_fraction=0",
        "loss.importance_clip=null",
        *NO_REWARD,
    ]
    if config.teacher.kind == "base":  # the learner scores, at ids that it chooses
        keys += ["rollout.topk_from=learner", "loss.support=student"]
    else:
        keys += ["rollout.topk_from=engine", "loss.support=teacher"]
    return (
        [*keys, "loss.form=nll", "loss.clip_per_entry=null"]
        if method == "sequence"
        else [*keys, "loss.direction=forward"]
    )


def is_finished(run: PlannedRun) -> bool:
    """True if the run has finished under exactly the planned configuration."""
    if run.config is None:
        return False
    summary = run.config.run.path / "summary.json"
    return (
        summary.is_file()
        and json.loads(summary.read_text(encoding="utf-8"))["outcome"] == "finished"
        and has_config(run.config)
    )


def can_resume(run: PlannedRun) -> bool:
    """True if the run left a checkpoint under exactly the planned configuration."""
    if run.config is None:
        return False
    return any(run.config.run.path.glob("checkpoints/step-*/manifest.json")) and has_config(run.config)


def has_config(config: Config) -> bool:
    """True if the run's folder holds a run of exactly this configuration."""
    written = config.run.path / "config.yaml"
    return written.is_file() and written.read_text(encoding="utf-8") == dump_config(config)
