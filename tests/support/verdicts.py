"""Accuracy from a list of verdicts, for tests of figures."""

from __future__ import annotations

from collections.abc import Iterable

from common.evaluation.accuracy import Accuracy, pass_at_1


def accuracy_of(verdicts: Iterable[bool]) -> Accuracy:
    """Accuracy of one verdict per row; rows are numbered from 0."""
    return pass_at_1({str(row): [bool(verdict)] for row, verdict in enumerate(verdicts)})
