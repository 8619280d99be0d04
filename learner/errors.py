"""Errors that end a run."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run cannot go on; the text says why, and the remedy."""


class ServiceLost(RunError):
    """An actor died or holds half of an update, and cannot be replaced: the run must go back to its last checkpoint."""


class SaveError(RunError):
    """The weights were not written as a model folder; the learner still has them."""
