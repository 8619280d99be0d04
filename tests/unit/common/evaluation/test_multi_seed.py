"""Figures over several runs on the same rows, and the coverage of their intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from common.evaluation.accuracy import change
from common.evaluation.multi_seed import Rows, accuracy_over_seeds, change_over_seeds, fieller, gap_closed
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


@pytest.mark.parametrize(("seeds", "between"), [(2, 0.06), (3, 0.0), (3, 0.06), (3, 0.15), (6, 0.1)])
def test_the_intervals_cover_the_truth(seeds: int, between: float) -> None:
    """With normal quantiles, three runs that differ by 0.15 would be covered in 9 of 10 cases."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(600):
        before = crossed(rng, seeds, 60, level=0.45, between=between)
        after = crossed(rng, seeds, 60, level=0.55, between=between)
        found = accuracy_over_seeds(after), change_over_seeds(before, after)
        covered += [found[0].ci95[0] <= 0.55 <= found[0].ci95[1], found[1].ci95[0] <= 0.1 <= found[1].ci95[1]]
    assert (covered / 600 >= 0.94).all()


Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray, np.ndarray]]


def near_one(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return np.zeros(rows), rng.random(rows) < 0.94, rng.random(rows) < 0.95


def partly(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    base, teacher = rng.random(rows) < 0.25, rng.random(rows) < 0.7
    return base, teacher, np.where(rng.random(rows) < 0.6, teacher, base)


def perfect_teacher(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return np.zeros(rows), np.ones(rows), rng.random(rows) < 0.98


def nothing_learned(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, ...]:
    return np.zeros(rows), rng.random(rows) < 0.83, rng.random(rows) < 0.01


@pytest.mark.parametrize("rows", [16, 64, 256])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [(near_one, 0.95 / 0.94), (partly, 0.6), (perfect_teacher, 0.98), (nothing_learned, 0.01 / 0.83)],
)
def test_the_interval_of_the_gap_closed_covers_the_truth(draw: Draw, truth: float, rows: int) -> None:
    rng = np.random.default_rng(3)
    intervals = [gap_closed(*([rows_of(values)] for values in draw(rng, rows)))[1] for _ in range(600)]
    known = [interval for interval in intervals if interval is not None]
    assert np.mean([low <= truth <= high for low, high in known]) >= 0.94
    assert all(high - low > 0.01 for low, high in known)
    if draw is not partly:
        assert len(known) == 600


def test_the_interval_of_the_gap_closed_is_the_delta_methods() -> None:
    """With 400 rows a ratio of means is nearly normal: compare both ends with the linearised variance."""
    rng = np.random.default_rng(2)
    base, teacher, final = (values.astype(float) for values in partly(rng, 400))
    value, found = gap_closed(*([rows_of(values)] for values in (base, teacher, final)))
    assert value is not None
    assert found is not None
    gaps, gains = teacher - base, final - base
    half = 1.96 * (gains - value * gaps).std() / gaps.mean() / 400**0.5
    assert found == pytest.approx((value - half, value + half), abs=0.15 * half)


def test_fiellers_interval_by_hand() -> None:
    """Independent means 3 and 2, standard errors 0.5 and 0.4: the roots of (3 - 2r)^2 = z^2 (0.25 + 0.16 r^2)."""
    found = fieller(np.array([3.0, 2.0]), np.diag([0.25, 0.16]))
    assert found is not None
    for ratio in found:
        assert (3 - 2 * ratio) ** 2 == pytest.approx(1.959964**2 * (0.25 + 0.16 * ratio**2))
    assert found[0] < 1.5 < found[1]
    assert fieller(np.array([3.0, 2.0]), np.diag([0.25, 1.1])) is None  # 2 is within 1.96 standard errors of zero


def test_a_failed_seed_widens_the_interval_of_the_gap_closed() -> None:
    base, teacher = [binary("0" * 30)] * 4, [binary("1" * 27 + "0" * 3)] * 4
    good, bad = binary("1" * 24 + "0" * 6), binary("0" * 30)
    steady, one_failed = (
        gap_closed(base, teacher, [good] * 4),
        gap_closed(base, teacher, [good, good, good, bad]),
    )
    assert steady[0] == pytest.approx(24 / 27)
    assert one_failed[0] == pytest.approx(0.75 * 24 / 27)
    assert steady[1] is not None
    assert one_failed[1] is not None
    assert steady[1][0] > 0.65
    assert one_failed[1][0] < 0.1


def test_the_gap_closed_without_a_gap_and_of_a_harmful_context() -> None:
    few = [binary("0101")]
    assert gap_closed(few, few, few) == (None, None)
    assert gap_closed(few, [binary("0111")], [binary("0111")]) == (1.0, None)
    base, teacher = [binary("1" * 90 + "0" * 10)], [binary("1" * 10 + "0" * 90)]
    value, found = gap_closed(base, teacher, teacher)
    assert value == 1.0
    assert found is not None
    assert 0.9 < found[0] < 1.0 < found[1] < 1.1


def test_rows_are_paired_by_name_and_must_be_the_same() -> None:
    first, second = {"a": 1.0, "b": 0.0}, {"b": 0.0, "a": 1.0}
    assert accuracy_over_seeds([first, second]).rows == {"a": 1.0, "b": 0.0}
    assert change_over_seeds([first], [second]).change == 0
    with pytest.raises(ValueError, match="compared: c"):
        accuracy_over_seeds([first, {**second, "c": 1.0}])
    with pytest.raises(ValueError, match="paired"):
        change_over_seeds([first, first], [second])
