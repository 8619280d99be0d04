"""Files of a run survive a crash."""

from __future__ import annotations

import json
from pathlib import Path

from common.telemetry.run_files import RunFiles, write_json


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with RunFiles(tmp_path / "run") as files:
        files.metrics(1, {"kl": 0.5, "note": "x"})
        files.sample({"id": "a"})
        assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == {"step": 1, "kl": 0.5, "note": "x"}
        assert json.loads((tmp_path / "run/samples.jsonl").read_text()) == {"id": "a"}
        assert list((tmp_path / "run/tensorboard").iterdir())


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
