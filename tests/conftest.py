"""Fixtures that many tests share. Engines, servers and whole runs cost seconds each: they start once a test process."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.families import Families
from tests.support.ray_nodes import SAME_PRIORITY, ray_cluster
from tests.support.runs import ReferenceRun, reference_run
from tests.support.tiny import make_tiny_model


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of ``make soak``."""
    parser.addoption("--long", action="store_true", help="run soak and fuzzing tests for minutes instead of seconds")


def pytest_configure(config: pytest.Config) -> None:
    # More threads than free cores make tiny models many times slower.
    torch.set_num_threads(1)
    os.environ.update(SAME_PRIORITY)
    # Verdicts do not depend on the machine's speed.
    settings.register_profile("opcd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("opcd")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; child processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def visible_gpus() -> Iterator[None]:
    """Undo what the class of an actor does to this process when a test calls it without Ray: hide all GPUs."""
    yield
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if VISIBLE is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE


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
    """Environment variables of a driver that joins the test process's Ray cluster."""
    with ray_cluster() as environment:
        yield environment


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> ReferenceRun:
    """The run that resumed and disturbed runs must equal to the bit: one for all test processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "reference"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "run.pickle").exists():
            (folder / "run.pickle").write_bytes(pickle.dumps(reference_run(folder, tiny_model)))
    found: ReferenceRun = pickle.loads((folder / "run.pickle").read_bytes())
    return found
