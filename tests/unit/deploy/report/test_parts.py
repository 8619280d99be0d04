"""The pieces of a page: escaping, numbers, axes, charts."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from deploy.report.charts import Bar, Interval, Scale, Series, interval_chart, line_chart, stacked_bars
from deploy.report.html import Html, join, tag
from deploy.report.numbers import duration, fixed, number, percent, spaced, thin, tick, ticks


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b> & 'x'", Html("<i>y</i>")) == "<p>&lt;b&gt; &amp; &#x27;x&#x27;<i>y</i></p>"
    assert join("<", [Html("<br/>"), None, 3]) == "&lt;<br/>3"


def test_markup_that_was_changed_is_text_again() -> None:
    assert tag("p", Html("<i>") + "<b>") == "<p>&lt;i&gt;&lt;b&gt;</p>"


def test_attributes_are_escaped_named_and_left_out() -> None:
    assert tag("a", class_="x", aria_label='"<', hidden=True, open=False, title=None) == (
        '<a class="x" aria-label="&quot;&lt;" hidden></a>'
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (1234567, "1,234,567"), (0.12345, "0.123"), (2.0, "2.00"), (4e-5, "4.00e-05"), (None, "–")],
)
def test_numbers(value: object, text: str) -> None:
    assert number(value) == text


def test_a_number_that_is_none_is_named() -> None:
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


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # well-formed, or this raises


def test_a_line_stands_where_its_numbers_say() -> None:
    svg = drawn(line_chart("x", [Series("a", "student", [(0.0, 0.0), (10.0, 2.0)])]))
    (line,) = svg.iter("polyline")
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.get("points", "").split())
    grid = {text.text: float(text.get("y", "nan")) - 4 for text in svg.iter("text") if text.get("text-anchor") == "end"}
    assert (y0, y1) == (pytest.approx(grid["0"], abs=0.1), pytest.approx(grid["2"], abs=0.1))
    assert x0 < x1
    assert y0 > y1


def test_a_gap_parts_a_line() -> None:
    values = [1.0, 2.0, math.nan, 3.0, 4.0]
    svg = drawn(line_chart("x", [Series("a", "student", [(float(x), y) for x, y in enumerate(values)])]))
    assert len(list(svg.iter("polyline"))) == 2
    assert "nan" not in ElementTree.tostring(svg, "unicode")


def test_without_numbers_there_is_a_word_instead() -> None:
    assert "no data" in line_chart("KL", [Series("a", "student", [(1.0, math.nan)])])


def test_steps_have_whole_numbers_on_the_axis() -> None:
    svg = line_chart("x", [Series("a", "plain", [(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)])])
    under = re.findall(r'text-anchor="middle">([^<]*)<', svg)
    assert under == ["1", "2", "3"]


def test_intervals_reach_from_end_to_end() -> None:
    svg = drawn(interval_chart("x", [Interval("a", "student", 0.5, 0.25, 1.0)]))
    whisker = next(line for line in svg.iter("line") if line.get("class") == "whisker")
    at = {text.text: float(text.get("x", "nan")) for text in svg.iter("text")}
    assert float(whisker.get("x1", "nan")) == pytest.approx(at["25 %"])
    assert float(whisker.get("x2", "nan")) == pytest.approx(at["100 %"])


def test_stacks_stand_on_each_other() -> None:
    svg = drawn(stacked_bars("x", [Bar("1", [("a", 1.0), ("b", 3.0)], "t")], y_label="s"))
    lower, upper = svg.iter("rect")
    height = {one: float(one.get("height", "nan")) for one in (lower, upper)}
    assert height[upper] == pytest.approx(3 * height[lower], rel=1e-3)
    assert float(upper.get("y", "nan")) + height[upper] == pytest.approx(float(lower.get("y", "nan")), abs=1e-2)
