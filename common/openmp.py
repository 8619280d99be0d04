"""Waiting policy of OpenMP threads on a machine whose cores several processes share."""

from __future__ import annotations

from collections.abc import MutableMapping

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
