"""Checks of the models: they exist, and their limits fit the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from common.config.model import Config, ConfigError
from common.data.model_lookup import is_cached, looks_like_path, model_limit, require_model
from common.files import seen_from
from learner.preflight.report import Finding, error, warning


def named_models(config: Config) -> Mapping[str, str]:
    """Key of the configuration -> model that the run loads."""
    named = {"student.model": config.student.model}
    for name, teacher in config.named_teachers().items():
        if teacher.model is not None:
            named[f"{'teacher' if name == 'default' else f'teachers.{name}'}.model"] = teacher.model
    return named


def is_on_this_machine(model: str) -> bool:
    """True for a folder and for a model in the hub's cache."""
    return (Path(model) / "config.json").is_file() or is_cached(model)


def check_models(config: Config) -> Iterator[Finding]:
    """Find paths without a model, folders that are no model, and hub names that are not on this machine."""
    for key, model in named_models(config).items():
        if Path(model).is_dir():
            if not (Path(model) / "config.json").is_file():
                yield error(f"{key} {model}: not a model folder (no config.json)")
        elif looks_like_path(model):
            try:
                require_model(model)
            except ConfigError as fault:
                yield error(f"{key}: {fault}")
        elif not is_cached(model):
            yield warning(
                f"{key} {model} is not on this machine: no folder{seen_from(Path(model))}, and not in the hub's cache; "
                "a run would ask the hub for it"
            )


def check_hub(config: Config) -> Iterator[Finding]:
    """Find hub names that are not in the cache and that the hub does not provide, in one request each."""
    for key, model in named_models(config).items():
        if not Path(model).is_dir() and not looks_like_path(model):
            try:
                require_model(model)
            except ConfigError as fault:
                yield error(f"{key}: {fault}")


def check_student_limits(config: Config) -> Iterator[Finding]:
    """Find a length that the student's model does not have."""
    asked = config.student.max_sequence_tokens
    if asked is None or not is_on_this_machine(config.student.model):
        return
    limit = model_limit(config.student.model)
    if limit is not None and asked > limit:
        yield error(f"student.max_sequence_tokens is {asked}, {config.student.model} takes at most {limit}: lower it")
