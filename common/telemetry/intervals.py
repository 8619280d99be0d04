"""Arithmetic of time intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
"""(start, end), seconds since the epoch."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as disjoint, ordered, non-empty intervals."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > start:
            found.append((start, end))
    return found


def covered_s(intervals: Iterable[Interval]) -> float:
    """Seconds inside at least one of `intervals`: overlaps count once."""
    return sum(end - start for start, end in merged(intervals))


def intersection(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Moments inside both, disjoint and ordered."""
    left, right = merged(first), merged(second)
    found: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            found.append((start, end))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return found


def difference(first: Iterable[Interval], second: Iterable[Interval]) -> list[Interval]:
    """Moments of `first` outside `second`, disjoint and ordered."""
    excluded = merged(second)
    borders: Sequence[float] = [float("-inf"), *(t for interval in excluded for t in interval), float("inf")]
    gaps = list(zip(borders[::2], borders[1::2], strict=True))
    return intersection(first, gaps)
