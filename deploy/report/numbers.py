"""Formats numbers, chooses axis ticks and thins series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Point = tuple[float, float]
MISSING = "–"


def is_number(value: Any) -> bool:
    """True for an int or a float, NaN included; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any, digits: int = 3) -> str:
    """`value` to `digits` significant digits, ``1,234`` from a thousand on; a dash if it is no number."""
    if not is_number(value):
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) >= 1000 or (isinstance(value, int) and abs(value) >= 10**digits):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text if isinstance(value, float) else str(value)


def fixed(value: Any, decimals: int) -> str:
    """`value` with a fixed number of decimals, for columns that align; a dash if it is no number."""
    if not is_number(value):
        return MISSING
    return f"{value:,.{decimals}f}" if math.isfinite(value) else str(value)


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as a percentage; a dash for None, NaN and infinities."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f} %"


def duration(seconds: float | None) -> str:
    """``42 s``, ``6 min 05 s``, ``3 h 20 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def ticks(low: float, high: float, max_intervals: int = 5) -> list[float]:
    """About `max_intervals` + 1 round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        span, high = max(abs(low), 1.0), low + max(abs(low), 1.0)
    raw = span / max_intervals
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick(value: float) -> str:
    """The label of an axis tick, without needless zeros."""
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def tick_texts(values: Sequence[float]) -> list[str]:
    """Labels of an axis's ticks, with as many digits as it takes to tell them apart."""
    texts = [tick(value) for value in values]
    decimals = 0
    while len(set(texts)) < len(set(values)) and decimals < 12:
        decimals += 1
        texts = [f"{value:,.{decimals}f}" for value in values]
    return texts


def thin(points: Sequence[Point], max_points: int = 300) -> list[Point]:
    """About `max_points` points that draw the same line: the lowest and the highest of each stretch."""
    if len(points) <= max_points:
        return list(points)
    size = math.ceil(2 * len(points) / max_points)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {stretch.index(min(stretch, key=_height)), stretch.index(max(stretch, key=_height))}
        kept += [stretch[index] for index in sorted(ends)]
    return kept


def _height(point: Point) -> float:
    return point[1]


def spaced(count: int, max_count: int) -> list[int]:
    """Up to `max_count` evenly spaced indices below `count`, including the first and the last."""
    if count <= max_count:
        return list(range(count))
    if max_count == 1:
        return [count - 1]
    return sorted({round(index * (count - 1) / (max_count - 1)) for index in range(max_count)})
