"""Fixtures that many tests share. Engines, servers and whole runs cost seconds each: they start once a session."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.families import Families
from tests.support.ray_nodes import ray_cluster
from tests.support.runs import Body, ReferenceRun, reference_run
from tests.support.tiny import make_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of ``make soak``."""
    parser.addoption("--long", action="store_true", help="run soak and fuzzing tests for minutes instead of seconds")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "background_run(body): the test's `finished_run`, made in the background while other tests run"
    )
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; child processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of background runs last."""
    items.sort(key=lambda item: item.get_closest_marker("background_run") is not None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with tied embeddings."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="session")
def tiny_untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random model with a separate output layer."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False, seed=1)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """Folders of tiny models by family, each made at its first use: ``families / name``."""
    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[dict[str, str]]:
    """Environment variables of a driver that joins the session's Ray cluster."""
    with ray_cluster() as environment:
        yield environment


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> ReferenceRun:
    """The run that resumed and disturbed runs must equal to the bit."""
    return reference_run(tmp_path_factory.mktemp("reference"), tiny_model)


@pytest.fixture(scope="session")
def background_runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    shared_cluster: dict[str, str],
) -> Iterator[dict[Body, Future[Path]]]:
    """The runs of all selected tests with `background_run`, one at a time: a run alone leaves half a core idle."""
    markers = (marker for item in request.session.items for marker in item.iter_markers("background_run"))
    with ThreadPoolExecutor(max_workers=1) as executor:
        yield {
            body: executor.submit(body, tmp_path_factory.mktemp("background"), tiny_model, shared_cluster)
            for body in dict.fromkeys(marker.kwargs["body"] for marker in markers)
        }
        executor.shutdown(wait=False, cancel_futures=True)


@pytest.fixture
def finished_run(request: pytest.FixtureRequest, background_runs: dict[Body, Future[Path]]) -> Path:
    """Folder of the test's background run, once it has ended."""
    (marker,) = request.node.iter_markers("background_run")
    return background_runs[marker.kwargs["body"]].result()
