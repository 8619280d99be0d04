"""Parts of a page: escaping, numbers, axes, charts."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from deploy.report.charts import (
    Bar,
    Chart,
    Interval,
    Lane,
    Scale,
    Series,
    interval_chart,
    line_chart,
    stacked_bars,
    timeline,
)
from deploy.report.numbers import duration, fixed, number, percent, spaced, thin, tick, tick_texts, ticks
from deploy.report.page import render


def svg_of(chart: Chart) -> str:
    return render("chart.svg", chart=chart, style=None)


def test_text_and_attributes_are_escaped() -> None:
    interval = Interval("<b> & 'x'", "student", 0.5, 0.25, 1.0)
    svg = svg_of(interval_chart('"<', [interval]))
    assert 'aria-label="&#34;&lt;"' in svg
    assert "&lt;b&gt; &amp; &#39;x&#39;</text>" in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (1234567, "1,234,567"), (0.12345, "0.123"), (2.0, "2.00"), (4e-5, "4.00e-05"), (None, "–")],
)
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_values_that_are_no_finite_numbers() -> None:
    assert (number(math.nan), fixed(math.inf, 2), fixed(True, 2), percent(None)) == ("nan", "inf", "–", "–")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.25, "1.2 s"), (42.4, "42 s"), (365, "6 min 05 s"), (12_000, "3 h 20 min"), (None, "–"), (119.7, "2 min 00 s")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.7), (0, 1e-6), (5, 5), (0.98, 1.02), (0, 123456)])
def test_ticks_cover_the_range_in_even_round_steps(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 7
    steps = {f"{b - a:.6e}" for a, b in pairwise(marks)}
    assert len(steps) == 1
    assert steps.pop()[0] in "125"


@pytest.mark.parametrize("values", [[1000.0, 1000.5, 1001.0], [10000.0, 10000.05], [0.123450, 0.123455]])
def test_two_ticks_never_have_one_label(values: list[float]) -> None:
    texts = tick_texts(values)
    assert len(set(texts)) == len(values)
    assert [float(text.replace(",", "")) for text in texts] == pytest.approx(values, rel=1e-9)


def test_tick_texts_are_short() -> None:
    assert [tick(value) for value in (0.0, 0.5, 2.0, 12000.0, 5e-6)] == ["0", "0.5", "2", "12,000", "5e-6"]


def test_thinning_keeps_the_extremes_in_order() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234.0, 9.0)
    kept = thin(points, 100)
    assert len(kept) <= 101
    assert (1234.0, 9.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:50], 100) == points[:50]


def test_spaced_keeps_both_ends() -> None:
    assert spaced(3, 5) == [0, 1, 2]
    assert spaced(100, 3) == [0, 50, 99] or spaced(100, 3) == [0, 49, 99]
    assert spaced(9, 1) == [8]


def test_a_scale_maps_ends_to_ends() -> None:
    scale = Scale(2.0, 4.0, 100.0, 0.0)
    assert [scale(value) for value in (2.0, 3.0, 4.0)] == [100.0, 50.0, 0.0]


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(svg_of(chart))  # raises if it is not well-formed


def test_a_line_is_at_its_values() -> None:
    svg = drawn(line_chart("x", [Series("a", "student", [(0.0, 0.0), (10.0, 2.0)])]))
    (line,) = svg.iter("polyline")
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.get("points", "").split())
    grid = {text.text: float(text.get("y", "nan")) - 4 for text in svg.iter("text") if text.get("text-anchor") == "end"}
    assert (y0, y1) == (pytest.approx(grid["0"], abs=0.1), pytest.approx(grid["2"], abs=0.1))
    assert x0 < x1
    assert y0 > y1


def test_a_gap_splits_a_line() -> None:
    values = [1.0, 2.0, math.nan, 3.0, 4.0]
    svg = drawn(line_chart("x", [Series("a", "student", [(float(x), y) for x, y in enumerate(values)])]))
    assert len(list(svg.iter("polyline"))) == 2
    assert "nan" not in ElementTree.tostring(svg, "unicode")


def test_a_chart_without_numbers_says_so() -> None:
    assert "KL: no data." in svg_of(line_chart("KL", [Series("a", "student", [(1.0, math.nan)])]))
    assert "x: no data." in svg_of(stacked_bars("x", [], y_label="s"))


def test_steps_have_whole_numbers_on_the_axis() -> None:
    svg = svg_of(line_chart("x", [Series("a", "plain", [(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)])]))
    under = re.findall(r'text-anchor="middle">([^<]*)<', svg)
    assert under == ["1", "2", "3"]


def test_intervals_reach_from_end_to_end() -> None:
    svg = drawn(interval_chart("x", [Interval("a", "student", 0.5, 0.25, 1.0)]))
    whisker = next(line for line in svg.iter("line") if line.get("class") == "whisker")
    at = {text.text: float(text.get("x", "nan")) for text in svg.iter("text")}
    assert float(whisker.get("x1", "nan")) == pytest.approx(at["25 %"])
    assert float(whisker.get("x2", "nan")) == pytest.approx(at["100 %"])


def test_parts_of_a_bar_are_stacked() -> None:
    svg = drawn(stacked_bars("x", [Bar("1", [("a", 1.0), ("b", 3.0)], "t")], y_label="s"))
    lower, upper = svg.iter("rect")
    height = {one: float(one.get("height", "nan")) for one in (lower, upper)}
    assert height[upper] == pytest.approx(3 * height[lower], rel=1e-3)
    assert float(upper.get("y", "nan")) + height[upper] == pytest.approx(float(lower.get("y", "nan")), abs=1e-2)


def test_spans_of_a_lane_start_and_end_at_their_seconds() -> None:
    svg = drawn(timeline("x", [Lane("worker 0", "rollout", "a", [(0.5, 1.5)])], 2.0))
    (span,) = svg.iter("rect")
    at = {text.text: float(text.get("x", "nan")) for text in svg.iter("text") if text.get("text-anchor") == "middle"}
    start, width = float(span.get("x", "nan")), float(span.get("width", "nan"))
    assert (start, start + width) == (pytest.approx(at["0.5 s"]), pytest.approx(at["1.5 s"], abs=0.01))
