"""The smallest valid configuration."""

from __future__ import annotations

from typing import Any

from common.config.loader import validate
from common.config.model import Config


def config_of(**sections: Any) -> Config:
    settings = {
        "run": {"name": "r"},
        "student": {"model": "m"},
        "context": {"text": "c"},
        "data": {"train": "t"},
        **sections,
    }
    return validate(Config, settings)
