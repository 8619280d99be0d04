"""OpenMP threads: the cores to share, the waiting policy and its effect on the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.openmp import SPINS, share_cores, usable_cores


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_user_set_stays(own: dict[str, str]) -> None:
    environment = dict(own)
    share_cores(environment)
    assert environment == own


def test_torch_reads_it() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    share_cores(environment)
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    shown = subprocess.run(
        [sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True, check=True
    ).stderr
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in shown
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)]
)
def test_usable_cores_are_those_of_the_affinity_and_the_containers_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    path = tmp_path / "cpu.max"
    assert usable_cores(path) == 8  # no container
    path.write_text(f"{quota}\n")
    assert usable_cores(path) == cores
