"""Accuracy with several answers per row, and paired changes, with their intervals."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from common.evaluation.accuracy import Accuracy, change, pass_at_1, wilson
from tests.support.verdicts import accuracy_of


def sampled(rng: np.random.Generator, chances: np.ndarray, samples: int) -> Accuracy:
    return pass_at_1({str(i): list(rng.random(samples) < chance) for i, chance in enumerate(chances)})


def binary(values: str) -> Accuracy:
    """Accuracy of rows marked right (``1``) or wrong (``0``)."""
    return accuracy_of([value == "1" for value in values])


def test_the_interval_is_wilsons() -> None:
    half = accuracy_of([True] * 64 + [False] * 64)
    assert half.accuracy == 0.5
    assert half.ci95 == pytest.approx((0.4146, 0.5854), abs=2e-4)  # n = 128 at p = 0.5: about 8.5 points either way
    assert accuracy_of([False] * 10).ci95 == pytest.approx((0.0, 0.2775), abs=2e-4)


def test_pass_at_1_is_the_mean_of_the_rows_shares() -> None:
    found = pass_at_1({"a": [True, True], "b": [True, False], "c": [False, False]})
    assert found.accuracy == pytest.approx(0.5)
    assert (found.n, found.samples) == (3, 2)
    assert dict(found.rows) == {"a": 1.0, "b": 0.5, "c": 0.0}


def test_equal_answers_to_a_row_count_as_one() -> None:
    verdicts = [True] * 30 + [False] * 10
    once = accuracy_of(verdicts)
    repeated = pass_at_1({str(i): [right] * 8 for i, right in enumerate(verdicts)})
    assert repeated.ci95 == pytest.approx(once.ci95)
    assert once.ci95 == pytest.approx(wilson(0.75, 40))


def test_independent_answers_all_count() -> None:
    """With the same share in every row only the sampling noise of the answers is left."""
    found = pass_at_1({str(i): [True, False] for i in range(50)})
    assert found.ci95 == pytest.approx(wilson(0.5, 100))


def test_if_all_answers_are_right_the_rows_count() -> None:
    assert pass_at_1({str(i): [True] * 16 for i in range(20)}).ci95 == pytest.approx(wilson(1.0, 20))


def test_the_interval_covers_the_truth_and_equals_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(0)
    covered, widths, bootstrapped = 0, [], []
    for repeat in range(400):
        chances = rng.beta(0.6, 0.9, 60)  # rows differ: a few are nearly always right, more nearly never
        found = sampled(rng, chances, 4)
        covered += found.ci95[0] <= 0.6 / 1.5 <= found.ci95[1]
        if repeat < 20:
            shares = np.array(list(found.rows.values()))
            means = rng.choice(shares, (2000, len(shares))).mean(-1)
            widths.append(found.ci95[1] - found.ci95[0])
            bootstrapped.append(float(np.subtract(*np.quantile(means, (0.975, 0.025)))))
    assert 0.92 <= covered / 400 <= 0.98
    assert np.mean(widths) == pytest.approx(np.mean(bootstrapped), rel=0.06)


@pytest.mark.parametrize("verdicts", [{}, {"a": []}, {"a": [True], "b": [True, False]}])
def test_rows_with_other_numbers_of_answers_are_refused(verdicts: dict[str, list[bool]]) -> None:
    with pytest.raises(ValueError, match="same number"):
        pass_at_1(verdicts)


def test_unchanged_rows_do_not_widen_the_interval_of_a_change() -> None:
    before, after = binary("1" * 50 + "0" * 50), binary("1" * 50 + "0" * 40 + "1" * 10)
    found = change(before, after)
    assert found.change == pytest.approx(0.1)
    assert not found.covers_zero
    assert before.ci95[1] > after.ci95[0]  # apart, the two intervals would hide it
    mean, second = 10 / 102, 12 / 102  # Bonett and Price, by hand
    half = 1.959964 * ((second - mean**2) / 102) ** 0.5
    assert found.ci95 == pytest.approx((mean - half, mean + half))


def test_an_observed_change_of_zero_has_an_interval() -> None:
    found = change(binary("1100"), binary("1100"))
    assert found.change == 0.0
    assert found.ci95[0] < -0.2 < 0.2 < found.ci95[1]


def test_the_interval_of_a_change_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        before, after = rng.random(40) < 0.3, np.zeros(40, bool)
        after = np.where(before, rng.random(40) < 0.9, rng.random(40) < 0.4)
        found = change(accuracy_of(list(before)), accuracy_of(list(after)))
        covered += found.ci95[0] <= 0.3 * 0.9 + 0.7 * 0.4 - 0.3 <= found.ci95[1]
    assert 0.93 <= covered / 600 <= 0.99


def test_results_of_other_rows_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different rows"):
        change(binary("110"), binary("11"))


def test_an_accuracy_survives_json() -> None:
    found = pass_at_1({"a": [True, True], "b": [True, False]})
    assert Accuracy.from_dict(json.loads(json.dumps(asdict(found)))) == found
    assert "rows" not in found.summary()
