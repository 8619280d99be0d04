"""Clocks of other nodes: the offset, its error, and when it is a warning."""

from __future__ import annotations

import pytest

from learner.cluster.clocks import ClockOffset, clock_warning, offset_of


@pytest.mark.parametrize("ahead", [-3.0, 0.0, 0.25])
@pytest.mark.parametrize("there", [0.0, 0.5, 1.0])
def test_the_offset_lies_within_its_error_however_the_way_is_split(ahead: float, there: float) -> None:
    """`there` is the part of the round trip before the other clock is read."""
    readings = [
        (100.0 + i, 100.0 + i + there * trip + ahead, 100.0 + i + trip) for i, trip in enumerate((0.9, 0.02, 0.3))
    ]
    found = offset_of(readings)
    assert found.error_s == pytest.approx(0.01)
    assert abs(found.seconds - ahead) <= found.error_s + 1e-9


def test_the_clock_that_is_off_most_is_named() -> None:
    line = clock_warning({"10.0.0.2": ClockOffset(0.3, 0.01), "10.0.0.3": ClockOffset(-3.2, 0.01)})
    assert line is not None
    assert line.startswith("the clock of node 10.0.0.3 is 3.20 s behind this one (± 0.01)")


@pytest.mark.parametrize("offset", [ClockOffset(0.05, 0.01), ClockOffset(0.4, 0.35), ClockOffset(-0.09, 0.0)])
def test_what_may_be_the_network_is_no_warning(offset: ClockOffset) -> None:
    assert clock_warning({"10.0.0.2": offset}) is None
    assert clock_warning({}) is None
