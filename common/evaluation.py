"""Accuracy on held-out rows, with its interval. Pure: the answers come from a rollout worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.graders import Grader

Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers; `ci95` is the Wilson score interval, which stays honest at 0 and at 1."""

    accuracy: float
    n: int
    ci95: tuple[float, float]


def accuracy(right: Sequence[bool]) -> Accuracy:
    """Accuracy and 95% interval of graded answers; at least one is needed."""
    n, p = len(right), sum(right) / len(right)
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Accuracy(accuracy=p, n=n, ci95=(max(0.0, centre - half), min(1.0, centre + half)))


def grade(answers: Sequence[str], expected: Sequence[str], grader: Grader) -> list[bool]:
    """One verdict per row; raises ValueError where an answer is missing."""
    return [grader(answer, right) for answer, right in zip(answers, expected, strict=True)]


def gap_closed(base: Accuracy, in_context: Accuracy, final: Accuracy) -> float | None:
    """(after - before) / (in context - before); None where the context makes no difference: nothing to distil."""
    gap = in_context.accuracy - base.accuracy
    return None if gap == 0 else (final.accuracy - base.accuracy) / gap
