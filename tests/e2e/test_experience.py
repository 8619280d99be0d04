"""Experience over a real engine, through the command line, up to the run that would distil it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from deploy.cli.main import app


def opcd(*arguments: str | Path) -> Result:
    """A command that starts nothing, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_from_problems_to_a_run_that_takes_what_was_learned(
    write_config: Callable[..., Path], tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    folder = tmp_path / "runs/tiny/experience"
    config = write_config(
        context={"text": None, "pool": str(folder / "selected.jsonl")},
        rollout={"batch_size": 4},
        experience={"seeds": 1, "problems": 4, "max_tokens": 16, "keep": 2},
    )
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "experience", "extract", config],
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
        env=shared_cluster,
    )
    assert done.returncode == 0, done.stderr
    assert "0 items from 4 problems (4 gave none, 0 were too long)" in done.stdout  # the model is random
    solved, extracted = lines(folder / "solved.jsonl")[1:], lines(folder / "extracted.jsonl")[1:]
    assert [line["position"] for line in solved] == [line["position"] for line in extracted] == [0, 1, 2, 3]
    assert all(line["problem"] == f"Q: {line['id']}\nA:" for line in solved)
    assert len({line["trace"] for line in solved}) > 1
    assert all(line["answer"] for line in extracted)
    refused = opcd("experience", "accumulate", config)
    assert refused.exit_code == 2
    assert "no answer has a line `- EXPERIENCE ITEM: ...`" in refused.stderr
    # A file may be edited between two stages: here with the items that a trained model would have written.
    head, *rest = (folder / "extracted.jsonl").read_text().splitlines()
    edited = [json.dumps({**json.loads(line), "items": [f"know {number}"]}) for number, line in enumerate(rest)]
    (folder / "extracted.jsonl").write_text("\n".join([head, *edited]) + "\n")
    for stage in ("accumulate", "select"):
        later = opcd("experience", stage, config)
        assert later.exit_code == 0, later.output
    selected = lines(folder / "selected.jsonl")
    assert len(selected) == 2
    assert all(one["text"].endswith(f"- know {one['problems'] - 1}\n\n") for one in selected)
    checked = opcd("train", config, "--dry-run")
    assert checked.exit_code == 0, checked.output
    assert "8 train, 4 valid, 4 eval" in checked.stdout
