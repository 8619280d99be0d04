"""How OpenMP threads wait for each other where processes share the cores of a machine."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "1000"
"""Turns that a thread of libgomp spins before it sleeps, tens of microseconds: between two products of one layer it is
awake, and it soon leaves its core to a process that has work. Measured on two cores, seconds of a learner's micro-batch
beside an answer under way, and alone: 1,000 turns 6.0 and 3.2, 10,000 8.1 and 3.2, none 5.7 and 3.6.
"""


def share_cores(environment: MutableMapping[str, str]) -> None:
    """Set the waiting of OpenMP threads in `environment`, unless it says something of its own; read by a process before
    its first parallel loop, and inherited by those that it starts.
    """
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # for the other runtimes; libgomp's own count goes before it
    environment["GOMP_SPINCOUNT"] = SPINS
