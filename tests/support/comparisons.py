"""Results of runs that were never started, for tests of comparisons."""

from __future__ import annotations

import json
from typing import Any

from common.config.loader import dump_config
from deploy.compare.plan import PlannedRun

ALL = ("opcd", "offpolicy", "sequence", "pg", "in_context")
"""All methods."""


def write_result(run: PlannedRun, right: str, *, outcome: str = "finished") -> None:
    """Write the result of a run; `right` holds a digit for each of four rows, 1 if the final answer is right."""
    assert run.config is not None
    folder = run.config.run.path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(run.config))
    share = sum(map(int, right)) / 4
    summary: dict[str, Any] = {
        "outcome": outcome,
        "final": {"accuracy": share},
        "gap_closed": share,
        "kl_first": 2.0,
        "kl_last": 0.5,
        "time_s": {"total": 30.0},
        "ood": {"other": {}},
        "perplexity": {"prose": {"change": 0.1 * (run.seed + 1)}},
    }
    rows = {"base": "0000", "in_context": "1111", "final": right, "ood/other/before": "1111", "ood/other/after": "1110"}
    (folder / "summary.json").write_text(json.dumps(summary))
    named = {name: {f"row{i}": float(value) for i, value in enumerate(text)} for name, text in rows.items()}
    (folder / "accuracy.json").write_text(json.dumps(named))
