"""Figures over several runs on the same rows, and the coverage of their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from common.evaluation.accuracy import change, gap_closed, gap_closed_ci95
from common.evaluation.multi_seed import Rows, accuracy_over_seeds, change_over_seeds, gap_closed_over_seeds
from tests.support.verdicts import accuracy_of


def rows_of(values: np.ndarray) -> Rows:
    return {str(index): float(value) for index, value in enumerate(values)}


def binary(text: str) -> Rows:
    return rows_of(np.array([float(character) for character in text]))


def crossed(rng: np.random.Generator, seeds: int, rows: int, *, level: float, between: float) -> list[Rows]:
    """Random answers of different runs (standard deviation `between`) to different rows."""
    difficulty, shift = rng.normal(0, 0.2, rows), rng.normal(0, between, seeds)
    return [rows_of((rng.random(rows) < np.clip(level + difficulty + s, 0, 1)).astype(float)) for s in shift]


def test_one_run_gives_its_own_figures() -> None:
    values = binary("1" * 13 + "0" * 7)
    found, own = accuracy_over_seeds([values]), accuracy_of([v == 1 for v in values.values()])
    assert (found.accuracy, found.n, found.ci95) == (own.accuracy, own.n, pytest.approx(own.ci95))
    after = binary("1" * 18 + "0" * 2)
    assert change_over_seeds([values], [after]) == change(own, accuracy_of([v == 1 for v in after.values()]))


def test_equal_runs_do_not_count_as_more_rows() -> None:
    values = binary("1" * 13 + "0" * 7)
    assert accuracy_over_seeds([values] * 5).ci95 == pytest.approx(accuracy_over_seeds([values]).ci95)


def test_different_runs_widen_the_interval() -> None:
    """The same total share of right answers, once equal in every run, once in half of the runs."""
    alike = [binary("10" * 20), binary("01" * 20), binary("10" * 20), binary("01" * 20)]
    apart = [binary("1" * 40), binary("0" * 40), binary("1" * 40), binary("0" * 40)]
    narrow, wide = accuracy_over_seeds(alike), accuracy_over_seeds(apart)
    assert narrow.accuracy == wide.accuracy == 0.5
    assert wide.ci95[1] - wide.ci95[0] > 2 * (narrow.ci95[1] - narrow.ci95[0])
    before = [binary("0" * 40)] * 4
    changes = change_over_seeds(before, alike), change_over_seeds(before, apart)
    assert changes[1].ci95[1] - changes[1].ci95[0] > 2 * (changes[0].ci95[1] - changes[0].ci95[0])


@pytest.mark.parametrize("between", [0.0, 0.1])
def test_the_intervals_cover_the_truth(between: float) -> None:
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(400):
        before = crossed(rng, 6, 60, level=0.4, between=between)
        after = crossed(rng, 6, 60, level=0.6, between=between)
        found = accuracy_over_seeds(after), change_over_seeds(before, after)
        covered += [found[0].ci95[0] <= 0.6 <= found[0].ci95[1], found[1].ci95[0] <= 0.2 <= found[1].ci95[1]]
    assert (covered / 400 >= 0.92).all()


def test_a_failed_seed_widens_the_interval_of_the_gap_closed() -> None:
    base, teacher = [binary("0" * 30)] * 4, [binary("1" * 27 + "0" * 3)] * 4
    good, bad = binary("1" * 24 + "0" * 6), binary("0" * 30)
    steady, one_failed = (
        gap_closed_over_seeds(base, teacher, [good] * 4),
        gap_closed_over_seeds(base, teacher, [good, good, good, bad]),
    )
    assert steady[0] == pytest.approx(24 / 27)
    assert one_failed[0] == pytest.approx(0.75 * 24 / 27)
    assert steady[1] is not None
    assert one_failed[1] is not None
    assert steady[1][0] > 0.7
    assert one_failed[1][0] < 0.5
    assert one_failed == gap_closed_over_seeds(base, teacher, [good, good, good, bad])


def test_one_run_gives_its_own_gap_closed() -> None:
    sets = [binary("0" * 20 + "1" * 10), binary("1" * 25 + "0" * 5), binary("1" * 15 + "0" * 5 + "1" * 10)]
    single = [accuracy_of([v == 1 for v in rows.values()]) for rows in sets]
    value, interval = gap_closed_over_seeds(*([rows] for rows in sets))
    assert value == pytest.approx(gap_closed(*single))
    assert interval == pytest.approx(gap_closed_ci95(*single), abs=0.08)


def test_without_a_gap_there_is_no_gap_closed() -> None:
    rows = [binary("0101")]
    assert gap_closed_over_seeds(rows, rows, rows) == (None, None)
    assert gap_closed_over_seeds(rows, [binary("0111")], [binary("0111")])[1] is None


def test_rows_are_paired_by_name_and_must_be_the_same() -> None:
    first, second = {"a": 1.0, "b": 0.0}, {"b": 0.0, "a": 1.0}
    assert accuracy_over_seeds([first, second]).rows == {"a": 1.0, "b": 0.0}
    assert change_over_seeds([first], [second]).change == 0
    with pytest.raises(ValueError, match="compared: c"):
        accuracy_over_seeds([first, {**second, "c": 1.0}])
    with pytest.raises(ValueError, match="paired"):
        change_over_seeds([first, first], [second])
