"""The alarm for a divergence that jumps."""

from __future__ import annotations

import math

from learner.loop.kl_alarm import KlAlarm


def test_a_jump_is_reported_and_what_is_usual_is_not() -> None:
    alarm = KlAlarm(5.0)
    assert [alarm.observe(value) for value in (2.0, 1.0, 0.5, 0.4, 0.6)] == [None] * 5
    line = alarm.observe(4.0)
    assert line is not None
    assert "4 nats" in line
    assert "0.6" in line
    assert alarm.raised == 1


def test_the_first_steps_say_nothing_however_they_move() -> None:
    alarm = KlAlarm(2.0)
    assert [alarm.observe(value) for value in (0.1, 5.0, 0.1)] == [None] * 3


def test_what_is_no_number_is_reported_at_any_step_and_does_not_count_as_usual() -> None:
    alarm = KlAlarm(5.0)
    assert alarm.observe(math.nan) is not None
    assert [alarm.observe(1.0) for _ in range(3)] == [None] * 3
    assert alarm.observe(math.inf) is not None
    assert alarm.observe(1.0) is None


def test_a_new_level_becomes_usual() -> None:
    alarm = KlAlarm(3.0)
    lines = [alarm.observe(value) for value in [1.0] * 10 + [10.0] * 12]
    assert lines[10] is not None
    assert lines[-1] is None
