"""The table of docs/models.md: the rows of the core, repeated; with ``make test-families`` every row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.families import CORE, FAMILIES, Families
from tests.support.family_engine import FamilyEngines
from tests.support.family_matrix import matrix_row, rows, whole_row


@pytest.fixture(scope="module")
def engines() -> Iterator[FamilyEngines]:
    running = FamilyEngines()
    yield running
    running.close()


def test_every_family_has_a_row() -> None:
    assert list(rows()) == list(FAMILIES)


@pytest.mark.parametrize("name", CORE[:4])
def test_rows_of_the_core(name: str, families: Families) -> None:
    """A few only, without an engine: the tests of teacher and learner repeat the core's numbers."""
    assert rows()[name].startswith(matrix_row(name, families / name))


@pytest.mark.families
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row(name: str, families: Families, engines: FamilyEngines) -> None:
    assert rows()[name] == whole_row(name, families / name, engines)
