"""When a run says that its answers have lost their variety."""

from __future__ import annotations

import pytest

from learner.loop.variety import FIRST_STEPS, MIN_PROMPTS, PATIENCE_STEPS, Variety, commonest_answer


def warned_at(shares: list[float | None]) -> list[int]:
    """Steps, from 1, with a warning."""
    alarm = Variety()
    return [step for step, share in enumerate(shares, start=1) if alarm.observe(share) is not None]


def test_a_collapse_is_one_warning() -> None:
    assert warned_at([0.1, 0.1, 0.2, 0.3, *[0.9] * 10]) == [FIRST_STEPS + 1 + PATIENCE_STEPS]


@pytest.mark.parametrize(
    "shares",
    [
        [0.8] * 20,  # letters: alike from the start
        [0.1, 0.1, 0.1, 0.9, 0.9, 0.1, 0.9, 0.9, 0.1],  # now and then
        [0.1, 0.1, 0.1, *[0.4] * 10],
        [None] * 20,
    ],
)
def test_no_warning(shares: list[float | None]) -> None:
    assert warned_at(shares) == []


def test_the_line_has_the_numbers() -> None:
    alarm = Variety()
    lines = [alarm.observe(share) for share in (0.1, 0.1, 0.1, 0.9, 0.9, 0.9)]
    assert lines[-1] is not None
    assert lines[-1].startswith(
        "the student gives one and the same answer to 90% of the step's prompts, at the start to"
    )


def test_prompts_are_counted_not_answers() -> None:
    """Several samples of one prompt may well be equal."""
    rows = [f"row {number}" for number in range(10)]
    assert commonest_answer({number: {row} for number, row in enumerate(rows)}) == 0.1
    assert commonest_answer({0: set(rows[:6]), 1: set(rows[5:])}) == 0.6
    assert commonest_answer({0: set(rows[: MIN_PROMPTS - 1])}) is None
    assert commonest_answer({}) is None
