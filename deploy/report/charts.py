"""Charts as inline SVG: pure functions from numbers to markup. Colours come from classes, so a page's themes apply.

A chart is a picture with a name; the numbers behind it stand in a table beside it (`deploy.report.parts.figure`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.report.html import Html, tag
from deploy.report.numbers import Point, thin, tick, ticks

WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 36
WIDEST_BAR = 64
DOTS = 14
"""A line of fewer points shows them."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, the class that colours it, its points in the order of x; no number: a gap."""

    name: str
    colour: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Scale:
    """From values in [`low`, `high`] to positions in [`start`, `end`]."""

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
    from_zero: bool = True,
) -> Html:
    """Lines over a common axis; `label` is what a screen reader says of the picture."""
    finite = [point for one in series for point in one.points if math.isfinite(point[0]) and math.isfinite(point[1])]
    if not finite:
        return nothing(label)
    x, x_ticks = _x_axis(finite)
    low, high = y_range or (min(p[1] for p in finite), max(p[1] for p in finite))
    if from_zero and y_range is None:
        low, high = min(low, 0.0), max(high, 0.0)
    y_ticks = ticks(low, high, 4)
    y = Scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    return tag(
        "svg",
        _grid(y, y_ticks),
        _bottom(x, x_ticks, height, x_label),
        [_line(one, x, y) for one in series],
        tag("line", class_="cursor", x1=0, x2=0, y1=TOP, y2=height - BOTTOM, visibility="hidden"),
        class_="chart lines",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=label,
        tabindex=0,
        data_x=json.dumps([x.low, x.high, x.start, x.end]),
        data_x_label=x_label,
        data_series=json.dumps(
            [{"name": one.name, "points": [[p[0], _short(p[1])] for p in _finite(one.points)]} for one in series]
        ),
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its interval: one row of `interval_chart`."""

    label: str
    colour: str
    value: float
    low: float
    high: float


def interval_chart(label: str, rows: Sequence[Interval]) -> Html:
    """Values in [0, 1] with their intervals, one below the other, as percentages."""
    row, top = 40, 6
    height = top + row * len(rows) + 34
    x = Scale(0.0, 1.0, 12, WIDTH - 24)
    bottom = top + row * len(rows)
    marks = [
        (
            tag("line", class_="grid", x1=x(share), x2=x(share), y1=top, y2=bottom),
            tag("text", f"{100 * share:.0f} %", class_="tick", x=x(share), y=bottom + 18, text_anchor="middle"),
        )
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    bars = []
    for index, one in enumerate(rows):
        middle = top + row * index + 27
        bars.append(
            tag(
                "g",
                tag("text", one.label, class_="row-label", x=12, y=middle - 11),
                tag("line", class_="whisker", x1=x(one.low), x2=x(one.high), y1=middle, y2=middle),
                [
                    tag("line", class_="whisker", x1=x(e), x2=x(e), y1=middle - 4, y2=middle + 4)
                    for e in (one.low, one.high)
                ],
                tag("circle", class_="dot", cx=x(one.value), cy=middle, r=5),
                class_=one.colour,
            )
        )
    return tag("svg", marks, bars, class_="chart", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


@dataclass(frozen=True, slots=True)
class Bar:
    """One stack of `stacked_bars`: where it stands, its parts (class, height) from below, and what it says."""

    x: str
    parts: Sequence[tuple[str, float]]
    title: str


def stacked_bars(label: str, bars: Sequence[Bar], *, y_label: str, width: int = 860, height: int = 240) -> Html:
    """Stacks of seconds, one a step."""
    highest = max((sum(size for _, size in bar.parts) for bar in bars), default=0.0)
    if highest <= 0:
        return nothing(label)
    y_ticks = ticks(0.0, highest, 4)
    y = Scale(0.0, y_ticks[-1], height - BOTTOM, TOP)
    pitch = min((width - LEFT - RIGHT) / len(bars), WIDEST_BAR)
    drawn = []
    every = math.ceil(len(bars) / 12)
    for index, bar in enumerate(bars):
        left, below, parts = LEFT + pitch * index, 0.0, []
        for colour, size in bar.parts:
            if size > 0:
                top = y(below + size)
                thick = {"x": left + pitch * 0.08, "width": max(1.0, pitch * 0.84)}
                parts.append(tag("rect", class_=colour, y=top, height=y(below) - top, **thick))
            below += size
        drawn.append(tag("g", tag("title", bar.title), parts))
        if index % every == 0:
            drawn.append(
                tag("text", bar.x, class_="tick", x=left + pitch / 2, y=height - BOTTOM + 17, text_anchor="middle")
            )
    return tag(
        "svg",
        _grid(y, y_ticks, width),
        drawn,
        tag("text", "step", class_="tick", x=LEFT + pitch * len(bars), y=height - 4, text_anchor="end"),
        tag("text", y_label, class_="tick", x=4, y=height - 4),
        class_="chart wide",
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=label,
    )


@dataclass(frozen=True, slots=True)
class Lane:
    """One row of `timeline`: who, doing what (which also colours it), and when, in seconds from the left edge."""

    track: str
    stage: str
    colour: str
    spans: Sequence[tuple[float, float]]


def timeline(label: str, lanes: Sequence[Lane], seconds: float, *, width: int = 860) -> Html:
    """Who worked when, over one step."""
    row, left, top = 22, 150, 4
    bottom = top + row * len(lanes)
    x_ticks = [mark for mark in ticks(0.0, seconds, 6) if mark <= seconds * 1.0001]
    x = Scale(0.0, seconds, left, width - RIGHT - 8)
    drawn = [
        (
            tag("line", class_="grid", x1=x(mark), x2=x(mark), y1=top, y2=bottom),
            tag("text", f"{tick(mark)} s", class_="tick", x=x(mark), y=bottom + 17, text_anchor="middle"),
        )
        for mark in x_ticks
    ]
    rows = []
    for index, lane in enumerate(lanes):
        above = top + row * index
        rows.append(tag("text", f"{lane.track} · {lane.stage}", class_="tick", x=0, y=above + 15))
        for start, end in lane.spans:
            thick = max(1.0, x(end) - x(start))
            rows.append(tag("rect", class_=lane.colour, x=x(start), y=above + 4, width=thick, height=row - 8, rx=2))
    height = bottom + 24
    return tag("svg", drawn, rows, class_="chart wide", viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def nothing(label: str) -> Html:
    """What stands where a chart has no numbers."""
    return tag("p", f"{label}: no data.", class_="none")


def _x_axis(points: Sequence[Point]) -> tuple[Scale, list[float]]:
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    if low == high:
        low, high = low - 1, high + 1
    marks = [mark for mark in ticks(low, high, 5) if low <= mark <= high and mark == round(mark)]
    return Scale(low, high, LEFT, WIDTH - RIGHT), marks


def _grid(y: Scale, marks: Sequence[float], width: int = WIDTH) -> list[Html]:
    return [
        tag(
            "g",
            tag("line", class_="grid", x1=LEFT, x2=width - RIGHT, y1=y(mark), y2=y(mark)),
            tag("text", tick(mark), class_="tick", x=LEFT - 7, y=y(mark) + 4, text_anchor="end"),
        )
        for mark in marks
    ]


def _bottom(x: Scale, marks: Sequence[float], height: int, name: str) -> list[Html]:
    under = height - BOTTOM + 17
    return [
        *(tag("text", tick(mark), class_="tick", x=x(mark), y=under, text_anchor="middle") for mark in marks),
        tag("text", name, class_="tick", x=WIDTH - RIGHT, y=height - 4, text_anchor="end"),
    ]


def _line(series: Series, x: Scale, y: Scale) -> Html:
    """Pieces between the gaps; single points as dots."""
    pieces: list[list[Point]] = [[]]
    for point in series.points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    few = len(_finite(series.points)) <= DOTS
    drawn = []
    for piece in pieces:
        places = [(x(p[0]), y(p[1])) for p in thin(piece)]
        if len(places) > 1:
            drawn.append(tag("polyline", class_="line", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places)))
        if few or len(places) == 1:
            drawn += [tag("circle", class_="dot", cx=a, cy=b, r=3) for a, b in places]
    return tag("g", drawn, class_=series.colour)


def _finite(points: Sequence[Point]) -> list[Point]:
    return thin([point for point in points if math.isfinite(point[1])])


def _short(value: float) -> float:
    return float(f"{value:.5g}")
