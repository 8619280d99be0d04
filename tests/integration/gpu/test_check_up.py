"""The GPU check-up on CPU: every check in tiny sizes, with Ray and vLLM hidden."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.checks import CHECKS

ROOT = Path(__file__).parents[3]
BARE = [check.name for check in CHECKS if not check.gpus]
"""Checks that need neither a GPU nor, therefore, vLLM."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one check-up."""
    out = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--without", "ray,vllm", "--out", str(out)]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    assert status == 0, (out / "log.txt").read_text()[-5000:]
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Results by check."""
    return {result["check"]: result for result in json.loads((folder / "results.json").read_text())["results"]}


@pytest.mark.parametrize("name", BARE)
def test_check_is_ok_on_cpu(results: dict[str, Any], name: str) -> None:
    assert results[name]["verdict"] == "OK"


def test_the_others_say_why_they_were_skipped(results: dict[str, Any]) -> None:
    reasons = {name: result["reason"] for name, result in results.items() if result["verdict"] == "SKIP"}
    assert set(reasons) == {check.name for check in CHECKS} - set(BARE)
    assert reasons["demo"] == "not installed: vllm, ray"
    assert reasons["nccl2"] == "needs 2 GPUs, this check-up has 0"


def test_table_has_a_row_for_each_check(folder: Path) -> None:
    table = (folder / "table.md").read_text()
    for check in CHECKS:
        assert f"\n| {check.name} | " in table


def test_torchs_error_has_the_name_that_makes_it_a_verdict() -> None:
    import torch

    from tests.gpu.child import one_line

    assert one_line(torch.OutOfMemoryError("5 GiB")) == "out of memory: 5 GiB"
