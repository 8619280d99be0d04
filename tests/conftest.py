"""Fixtures that many tests share. Engines and servers are started once a session: each costs seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import make_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """What ``make soak`` sets."""
    parser.addoption("--long", action="store_true", help="run soak and fuzzing tests for minutes instead of seconds")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with tied embeddings."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def tiny_untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with an output layer of its own."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False, seed=1)
