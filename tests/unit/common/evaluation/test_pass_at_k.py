"""pass@k against every choice of k answers, and against a simulation of fresh ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from common.evaluation.accuracy import pass_at_1
from common.evaluation.pass_at_k import ks, pass_at, rows_at_k


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_it_is_the_share_of_choices_with_a_right_answer(right: int, k: int) -> None:
    verdicts = [True] * right + [False] * (5 - right)
    choices = list(itertools.combinations(verdicts, k))
    expected = sum(any(choice) for choice in choices) / len(choices)
    assert rows_at_k({"a": right / 5}, 5, k)["a"] == pytest.approx(expected, abs=1e-12)


def test_it_is_unbiased() -> None:
    """The mean over many samples of eight is the probability that one of four is right."""
    rng, p = np.random.default_rng(0), 0.2
    shares = {str(n): float(c) / 8 for n, c in enumerate(rng.binomial(8, p, 20_000))}
    values = list(rows_at_k(shares, 8, 4).values())
    assert np.mean(values) == pytest.approx(1 - (1 - p) ** 4, abs=4 * np.std(values) / np.sqrt(20_000))


def test_reported_ks_are_powers_of_two_and_the_whole() -> None:
    assert [ks(n) for n in (1, 2, 3, 4, 8, 10)] == [[], [2], [2, 3], [2, 4], [2, 4, 8], [2, 4, 8, 10]]


def test_a_result_has_each_k_with_its_interval() -> None:
    result = pass_at_1({"a": [True, False, False, False], "b": [False] * 4, "c": [True] * 4})
    found = pass_at(result)
    assert list(found) == ["2", "4"]
    assert found["2"]["value"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert found["4"]["value"] == pytest.approx(2 / 3)
    low, high = found["4"]["ci95"]
    assert low < 2 / 3 < high
    assert pass_at(pass_at_1({"a": [True]})) == {}


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5 needs at least 5 answers a row, there are 4"):
        rows_at_k({"a": 0.5}, 4, 5)
