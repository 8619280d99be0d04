"""Geometry of the charts: numbers in, positions out. ``templates/charts.svg`` draws them as inline SVG.

Colours are CSS classes, so the page's light and dark themes apply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deploy.report.numbers import Point, thin, tick_texts, ticks

WIDTH, WIDE = 420, 860
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 36
"""Margins around the plot area of line and bar charts."""
MAX_BAR_WIDTH = 64
MAX_DOTS = 14
"""A line with at most this many points shows a dot at each."""

Marks = list[tuple[float, str]]
"""(position, text) of each tick of an axis."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its plot area. `kind` names the macro that draws `content`; `label` names it for screen readers."""

    kind: Literal["nothing", "lines", "intervals", "bars", "timeline"]
    label: str
    width: int = WIDTH
    height: int = 0
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = 0
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, its colour class, and its points ordered by x. A NaN value makes a gap."""

    name: str
    colour: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Scale:
    """Linear map from values in [`low`, `high`] to positions in [`start`, `end`]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    label: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    height: int = 220,
    y_range: tuple[float, float] | None = None,
) -> Chart:
    """Lines over a common axis. Without `y_range` the y axis includes zero."""
    finite = [point for one in series for point in one.points if all(map(math.isfinite, point))]
    if not finite:
        return Chart("nothing", label)
    x_low, x_high = min(p[0] for p in finite), max(p[0] for p in finite)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    x = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    x_ticks = [mark for mark in ticks(x_low, x_high, 5) if x_low <= mark <= x_high and mark == round(mark)]
    y_low, y_high = y_range or (min(0.0, *(p[1] for p in finite)), max(0.0, *(p[1] for p in finite)))
    y, y_marks = _y_axis(y_low, y_high, height)
    points = [
        {"name": one.name, "points": [[p[0], float(f"{p[1]:.5g}")] for p in _finite(one.points)]} for one in series
    ]
    content = {
        "x_label": x_label,
        "x_marks": _marks(x, x_ticks),
        "y_marks": y_marks,
        "lines": [(one.colour, _pieces(one, x, y)) for one in series],
        "x_scale": json.dumps([x.low, x.high, x.start, x.end]),
        "series": json.dumps(points),
    }
    return Chart("lines", label, height=height, bottom=height - BOTTOM, content=content)


def _pieces(series: Series, x: Scale, y: Scale) -> list[tuple[str, list[Point]]]:
    """(points of a polyline, dots) of each stretch between gaps."""
    stretches: list[list[Point]] = [[]]
    for point in series.points:
        if math.isfinite(point[1]):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    few = len(_finite(series.points)) <= MAX_DOTS
    pieces = []
    for stretch in stretches:
        positions = [(x(p[0]), y(p[1])) for p in thin(stretch)]
        polyline = " ".join(f"{a:.1f},{b:.1f}" for a, b in positions) if len(positions) > 1 else ""
        pieces.append((polyline, positions if few or len(positions) == 1 else []))
    return pieces


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its interval: one row of `interval_chart`."""

    label: str
    colour: str
    value: float
    low: float
    high: float


def interval_chart(label: str, rows: Sequence[Interval]) -> Chart:
    """Values in [0, 1] with their intervals, one row each, as percentages."""
    row, top = 40, 6
    bottom = top + row * len(rows)
    x = Scale(0.0, 1.0, 12, WIDTH - 24)
    content = {
        "x_marks": [(x(share), f"{100 * share:.0f} %") for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "rows": [
            (one.label, one.colour, x(one.value), x(one.low), x(one.high), top + row * index + 27)
            for index, one in enumerate(rows)
        ],
    }
    return Chart("intervals", label, height=bottom + 34, top=top, bottom=bottom, content=content)


@dataclass(frozen=True, slots=True)
class Bar:
    """One stack of `stacked_bars`: its x label, its (class, height) parts from below, and its tooltip."""

    x: str
    parts: Sequence[tuple[str, float]]
    title: str


def stacked_bars(label: str, bars: Sequence[Bar], *, y_label: str, height: int = 240) -> Chart:
    """One stack for each step."""
    highest = max((sum(size for _, size in bar.parts) for bar in bars), default=0.0)
    if highest <= 0:
        return Chart("nothing", label)
    y, y_marks = _y_axis(0.0, highest, height)
    pitch = min((WIDE - LEFT - RIGHT) / len(bars), MAX_BAR_WIDTH)
    every = math.ceil(len(bars) / 12)
    stacks = []
    for index, bar in enumerate(bars):
        left, below, parts = LEFT + pitch * index, 0.0, []
        for colour, size in bar.parts:
            if size > 0:
                parts.append((colour, y(below + size), y(below) - y(below + size)))
            below += size
        stacks.append((bar.title, left + pitch * 0.08, parts, bar.x if index % every == 0 else "", left + pitch / 2))
    content = {
        "y_marks": y_marks,
        "y_label": y_label,
        "stacks": stacks,
        "bar_width": max(1.0, pitch * 0.84),
        "end": LEFT + pitch * len(bars),
    }
    return Chart("bars", label, WIDE, height, right=WIDE - RIGHT, bottom=height - BOTTOM, content=content)


@dataclass(frozen=True, slots=True)
class Lane:
    """One row of `timeline`: a process, its stage, the colour class, and the (start, end) seconds of its work."""

    track: str
    stage: str
    colour: str
    spans: Sequence[tuple[float, float]]


def timeline(label: str, lanes: Sequence[Lane], seconds: float) -> Chart:
    """One lane for each process and stage, over [0, `seconds`]."""
    row, left, top = 22, 150, 4
    bottom = top + row * len(lanes)
    x = Scale(0.0, seconds, left, WIDE - RIGHT - 8)
    content = {
        "x_marks": _marks(x, [mark for mark in ticks(0.0, seconds, 6) if mark <= seconds * 1.0001], " s"),
        "lanes": [
            (lane, top + row * index, [(x(start), max(1.0, x(end) - x(start))) for start, end in lane.spans])
            for index, lane in enumerate(lanes)
        ],
        "bar_height": row - 8,
    }
    return Chart("timeline", label, WIDE, bottom + 24, left=left, top=top, bottom=bottom, content=content)


def _y_axis(low: float, high: float, height: int) -> tuple[Scale, Marks]:
    values = ticks(low, high, 4)
    y = Scale(values[0], values[-1], height - BOTTOM, TOP)
    return y, _marks(y, values)


def _marks(scale: Scale, values: Sequence[float], unit: str = "") -> Marks:
    return [(scale(value), text + unit) for value, text in zip(values, tick_texts(values), strict=True)]


def _finite(points: Sequence[Point]) -> list[Point]:
    return thin([point for point in points if math.isfinite(point[1])])
