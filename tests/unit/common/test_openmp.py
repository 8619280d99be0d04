"""Waiting policy of OpenMP threads: defaults, existing settings, effect on the library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common.openmp import SPINS, share_cores


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
