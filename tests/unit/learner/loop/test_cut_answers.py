"""When a run says that answers do not end."""

from __future__ import annotations

from learner.loop.cut_answers import PATIENCE_STEPS, CutAnswers


def warned_at(shares: list[float]) -> list[int]:
    """Steps, from 1, with a warning."""
    alarm = CutAnswers(6)
    return [step for step, share in enumerate(shares, start=1) if alarm.observe(share) is not None]


def test_a_student_that_learns_where_answers_end_is_no_warning() -> None:
    assert warned_at([1.0, 1.0, 0.9, 0.6, 0.3, 0.1, 0.0]) == []


def test_answers_that_never_end_are_one_warning() -> None:
    assert warned_at([0.9] * 20) == [PATIENCE_STEPS]


def test_answers_that_grow_without_end_later_are_found() -> None:
    assert warned_at([1.0, 1.0, 0.1, *[0.6] * 9]) == [3 + PATIENCE_STEPS]


def test_the_line_has_the_numbers_and_the_remedy() -> None:
    alarm = CutAnswers(6)
    lines = [alarm.observe(0.75) for _ in range(PATIENCE_STEPS)]
    assert lines[:-1] == [None] * (PATIENCE_STEPS - 1)
    assert lines[-1] is not None
    assert lines[-1].startswith("75% of the step's answers did not end within 6 tokens")
    assert "rollout.max_tokens" in lines[-1]
