"""Graders, accuracy and its interval, the gap closed."""

from __future__ import annotations

import pytest

from common.config.model import ConfigError
from common.evaluation.accuracy import accuracy, gap_closed, grade
from common.evaluation.graders import make_grader


@pytest.mark.parametrize(
    ("spec", "answer", "expected", "right"),
    [
        ("exact", " cats ", "cats", True),
        ("exact", "Cats", "cats", False),
        ("exact_casefold", "CATS", "cats", True),
        ("contains", "I say cats.", "cats", True),
        ("contains", "I say cat.", "cats", False),
        (r"regex:<answer>(.*?)</answer>", "so <answer> B </answer>", "B", True),
        (r"regex:<answer>(.*?)</answer>", "B", "B", False),
        (r"regex:[a-z]+s", "12 cats", "cats", True),
    ],
)
def test_graders(spec: str, answer: str, expected: str, right: bool) -> None:
    assert make_grader(spec)(answer, expected) is right


@pytest.mark.parametrize("spec", ["exakt", "regex", "regex:(", ""])
def test_an_unknown_grader_is_a_config_error(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"eval\.grader"):
        make_grader(spec)


def test_the_interval_is_wilsons() -> None:
    half = accuracy([True] * 64 + [False] * 64)
    assert half.accuracy == 0.5
    assert half.ci95 == pytest.approx((0.4146, 0.5854), abs=2e-4)  # n = 128 at p = 0.5: about 8.5 points either way
    assert accuracy([False] * 10).ci95 == pytest.approx((0.0, 0.2775), abs=2e-4)


def test_a_missing_answer_is_an_error_not_a_wrong_one() -> None:
    with pytest.raises(ValueError, match=r"longer|shorter"):
        grade(["a"], ["a", "b"], make_grader("exact"))


def test_gap_closed() -> None:
    base, teacher, final = (accuracy([True] * n + [False] * (10 - n)) for n in (1, 9, 7))
    assert gap_closed(base, teacher, final) == pytest.approx(0.75)
    assert gap_closed(base, base, final) is None
