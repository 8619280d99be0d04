"""Disk space of a run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from common.config.loader import validate
from common.config.model import Config
from common.sizing import disk
from common.sizing.disk import OTHER_BYTES, disk_needs, state_bytes
from deploy.docs_tools.sizes import qwen3

EIGHT = qwen3("8B")
N = EIGHT.parameters
GPU = {"gpus_per_rank": 1}


def config(folder: Path = Path("runs"), model: str = "unused", **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "sizes", "dir": str(folder)},
        "student": {"model": model},
        "context": {"text": "unused"},
        "data": {"train": "unused", "valid": "unused"},
        "eval": {"every": 0},
    }
    return validate(Config, {**tree, **sections})


def test_one_checkpoint_more_than_is_kept() -> None:
    needs = disk_needs(config(learner=GPU, checkpoint={"every": 10, "keep": 2}), EIGHT)
    assert needs["checkpoints"] == 3 * state_bytes(config(learner=GPU), EIGHT) == 3 * 14 * N
    assert state_bytes(config(learner={**GPU, "zero_stage": 3}), EIGHT) == 12 * N
    assert state_bytes(config(), EIGHT) == 12 * N  # float32 without ZeRO


def test_exports_are_counted_with_best_the_last_one_and_the_one_being_written() -> None:
    settings = {"export_every": 20, "export_at": [5, 20, 999], "every": 0}
    needs = disk_needs(config(learner={**GPU, "steps": 50}, checkpoint=settings, eval={"every": 5}), EIGHT)
    # steps 5, 20, 40; best/; checkpoint/; one while it is written
    assert needs == {"exports": 6 * 2 * N, "other files": OTHER_BYTES}


def test_adapters_take_little() -> None:
    lora = {"rank": 8, "publish": "adapter"}
    needs = disk_needs(config(learner={**GPU, "lora": lora}, checkpoint={"every": 1}), EIGHT)
    assert sum(needs.values()) < 0.3 * 2 * N


def test_a_folder_that_does_not_exist_yet_lies_on_its_parents_disk(tmp_path: Path) -> None:
    assert disk.free_bytes(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
