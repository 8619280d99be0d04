"""Rows that are games."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_games(folder: Path, options: dict[str, Any]) -> None:
    """Six games to train on, two to validate, three to be evaluated by."""
    for name, seeds in (("train", range(6)), ("valid", range(6, 8)), ("eval", range(8, 11))):
        rows = [{"id": f"lake-{s}", "environment": "FrozenLake", "options": options, "seed": s} for s in seeds]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
