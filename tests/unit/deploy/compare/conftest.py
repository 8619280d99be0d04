"""The configuration of the compared runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A configuration whose runs are never started."""
    settings = {
        "run": {"name": "small", "dir": str(tmp_path / "runs")},
        "student": {"model": "m"},
        "context": {"text": "c"},
        "data": {"train": "t", "eval": "e"},
        "rollout": {"temperature": 0.7, "max_staleness": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file
