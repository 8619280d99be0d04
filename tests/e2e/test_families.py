"""Whole runs of families that are not plain decoders: train, sync, export, reload in vLLM and transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.families import Families
from tests.support.family_engine import FamilyEngines
from tests.support.runs import finish, metric_lines, started_run, write_run

pytestmark = pytest.mark.timeout(300)

OTHERS = ("qwen3_5-vl", "gemma3-vl", "gpt_oss", "deepseek_v3")


@pytest.fixture(scope="module")
def engines() -> Iterator[FamilyEngines]:
    running = FamilyEngines()
    yield running
    running.close()


@pytest.mark.parametrize("name", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.families) for name in OTHERS)])
def test_a_run_and_its_export(
    name: str, families: Families, tmp_path: Path, shared_cluster: dict[str, str], engines: FamilyEngines
) -> None:
    source = families / name
    config = write_run(
        tmp_path,
        source,
        student={"max_sequence_tokens": 160},
        teacher={"max_sequence_tokens": 160},
        learner={"steps": 2},
        eval={"every": 0},
    )
    with started_run(config, environment=shared_cluster) as process:
        finish(process)
    lines = metric_lines(tmp_path / "runs/tiny")
    assert [line["weight_version"] for line in lines] == [1, 2]  # the sync of each was compared with the learner
    assert all(line["parity/rms_nats"] < 5e-5 for line in lines)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "runs/tiny/checkpoint"))
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    untrained = {key for key in before if "vision" in key or "visual" in key or "multi_modal" in key}
    assert not changed & untrained
    assert len(changed) > 0.9 * len(before.keys() - untrained)
    assert engines.cell(tmp_path / "runs/tiny/checkpoint") == "exact"
