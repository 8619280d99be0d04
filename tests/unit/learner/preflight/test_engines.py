"""The dry run says of every family what docs/models.md says of it, from the configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.models.engines import CPU_NEVER, text_type
from learner.preflight import engines
from learner.preflight.engines import check_engines
from tests.support.configs import config_of
from tests.support.families import FAMILIES, family_config
from tests.support.family_matrix import rows


def findings(folder: Path, **sections: Any) -> list[str]:
    """Levels and texts."""
    return [f"{one.level}: {one.text}" for one in check_engines(config_of(**sections, student={"model": str(folder)}))]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_dry_run_says_what_the_table_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _: None)  # torchvision is not there
    family_config(name).save_pretrained(tmp_path)
    cell = rows()[name].split(" | ")[3].removesuffix(" |")
    found = {
        dtype: [
            finding.level
            for finding in check_engines(
                config_of(student={"model": str(tmp_path), "dtype": dtype, "max_sequence_tokens": 160})
            )
        ]
        for dtype in ("float32", "bfloat16")
    }
    on_cpu = text_type(family_config(name)) in CPU_NEVER  # on GPUs vLLM computes it, so that it is refused here alone
    if cell == "stops: computes it otherwise" and not on_cpu:
        assert found == {"float32": ["warning"], "bfloat16": ["warning"]}
    elif cell == "stops: computes it otherwise in bfloat16":
        assert found == {"float32": ["error"], "bfloat16": ["warning"]}
    elif cell.startswith(("refused", "stops")):
        assert found == {"float32": ["error"], "bfloat16": ["error"]}
    else:
        assert found == {"float32": [], "bfloat16": []}
        assert cell in ("exact", "-")


def test_on_gpus_and_with_torchvision_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_config("gemma3-vl").save_pretrained(tmp_path)
    monkeypatch.setattr(engines, "find_spec", lambda _: None)
    (found,) = findings(tmp_path)
    assert found == (
        f"error: student.model {tmp_path}: vLLM's code of this family needs torchvision, which is not installed here, "
        "and which PyPI has for CUDA only: train it on GPUs"
    )
    assert not findings(tmp_path, rollout={"gpus_per_worker": 1})
    monkeypatch.setattr(engines, "find_spec", lambda _: object())
    assert not findings(tmp_path)
