"""Reads the configuration for the commands that start a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.config.loader import load_config
from common.config.model import Config
from common.import_names import use_folder


def load_run_config(config: str, overrides: Sequence[str] | None) -> Config:
    """Load the configuration of a run that starts in the current folder.

    Graders and environments in that folder become importable. Raises ConfigError, also for a folder whose packages
    hide opcd's.
    """
    use_folder(Path.cwd())
    return load_config(config, overrides or ())
