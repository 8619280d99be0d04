"""Fixtures that many tests share. Engines, servers and whole runs cost seconds each: they start once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ray_nodes import ray_cluster
from tests.support.runs import ReferenceRun, reference_run
from tests.support.tiny import make_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of ``make soak``."""
    parser.addoption("--long", action="store_true", help="run soak and fuzzing tests for minutes instead of seconds")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with tied embeddings."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def tiny_untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with a separate output layer."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False, seed=1)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[dict[str, str]]:
    """Environment variables of a driver that joins the session's Ray cluster."""
    with ray_cluster() as environment:
        yield environment


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> ReferenceRun:
    """The run that resumed and disturbed runs must equal to the bit."""
    return reference_run(tmp_path_factory.mktemp("reference"), tiny_model)
