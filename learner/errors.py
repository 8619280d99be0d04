"""Errors of a run as a whole."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run cannot go on; the text says why and what would help."""


class ServiceLost(RunError):
    """An actor died, or holds half of an update, and cannot be replaced in place: the run can only go on from its last
    checkpoint.
    """
