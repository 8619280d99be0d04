"""Makes environments by name: built-in ones, and a user's own as ``package.module:Class``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from rollout_workers.environments.base import Environment

ENVIRONMENTS = {
    "FrozenLake": "rollout_workers.environments.text_games:FrozenLake",
    "Sokoban": "rollout_workers.environments.text_games:Sokoban",
}
"""Name -> module and class; imported on first use, since some need the packages of an extra."""


def make_environment(name: str, options: Mapping[str, Any] | None = None) -> Environment:
    """Make a new environment; `options` are its constructor's arguments.

    Raises ValueError, with the remedy, for an unknown name, a class that cannot be imported, options that its
    constructor does not take, and a class without `reset` and `step`.
    """
    module, colon, attribute = ENVIRONMENTS.get(name, name).partition(":")
    if not colon:
        raise ValueError(
            f"unknown environment {name!r}; known: {', '.join(sorted(ENVIRONMENTS))}, "
            "or your own as package.module:Class"
        )
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        hint = "; it needs the `games` extra" if name in ENVIRONMENTS else ""
        raise ValueError(f"environment {name!r} cannot be imported: {error}{hint}") from error
    try:
        inspect.signature(kind).bind(**(options or {}))
    except TypeError as error:
        raise ValueError(f"environment {name!r}: {error}; it takes {inspect.signature(kind)}") from error
    environment = kind(**(options or {}))
    if not isinstance(environment, Environment):
        raise ValueError(f"environment {name!r} lacks `async reset(seed)` or `async step(answer)`")
    return environment
