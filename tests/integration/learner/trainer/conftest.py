"""Worlds of one and of two ranks, shared by the files of this folder."""

from tests.support.learner_ranks import cluster, one, two

__all__ = ["cluster", "one", "two"]
