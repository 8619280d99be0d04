"""OpenMP threads on a machine whose cores several processes share: their number, and how they wait."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Linux: the container's quota and period in microseconds."""

SPINS = "1000"
"""Iterations that a libgomp thread spins before it sleeps (tens of microseconds): it stays awake between two products
of one layer, and soon leaves its core to another process. Measured on two cores, seconds of a micro-batch during
a rollout, and alone: 1,000 iterations 6.0 and 3.2, 10,000 8.1 and 3.2, none 5.7 and 3.6.
"""


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Set the OpenMP waiting policy in `environment`, unless it has one.

    A process reads it before its first parallel loop; child processes inherit it.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # for other runtimes; in libgomp the count overrides it
    environment["GOMP_SPINCOUNT"] = SPINS


def usable_cores(cpu_max: Path = CPU_MAX) -> int:
    """Count the cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0))
    if not cpu_max.exists():
        return cores
    quota, period = cpu_max.read_text(encoding="utf-8").split()
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
