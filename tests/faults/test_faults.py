"""Any process of a run may die at any moment: the run ends where it would have ended, to the bit.

``make test-faults`` runs the whole matrix; ``make test`` the cases marked as its core.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from common.telemetry.trace import read_trace
from tests.support import ray_nodes as nodes
from tests.support.fault_driver import PHASES, VICTIMS
from tests.support.runs import write_run

pytestmark = pytest.mark.timeout(600)

CORE = {("worker", "rollout"), ("rank", "step")}

SECTIONS = {
    "teacher": {"batch_window_ms": 500},
    "rollout": {"workers": 2},
    "learner": {"steps": 3, "deterministic": True},
    "checkpoint": {"every": 1},
    "eval": {"every": 0},
    "sync": {"timeout_s": 30},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("faults"), tiny_model, **SECTIONS)


TWO_RANKS = ("learner.ranks=2", "learner.zero_stage=2")


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Hash of the weights that the run ends with when nothing dies."""
    return whole_run(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def undisturbed_of_two_ranks(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return whole_run(config, tmp_path_factory.mktemp("undisturbed"), *TWO_RANKS)


def whole_run(config: Path, folder: Path, *overrides: str) -> str:
    finished(["-m", "learner.train", str(config), f"run.dir={folder}", *overrides])
    return weights_of(folder / "tiny")


def finished(arguments: list[str], *, status: int = 0, environment: Mapping[str, str] | None = None) -> str:
    """Output of a Python process that ends with `status` and leaves nobody behind."""
    alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=alone if environment is None else environment,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == status, output
    return output


def weights_of(run: Path) -> str:
    return hashlib.sha256((run / "checkpoint/model.safetensors").read_bytes()).hexdigest()


def assert_every_sample_once(run: Path) -> None:
    """Each step was trained on its own 8 samples, none twice, none missing."""
    lines = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    counts = Counter(sample for line in lines for sample in line["trained"])
    assert set(counts.values()) == {1}
    assert len(counts) == 24
    assert not any(line["failed"] for line in lines)
    assert all(int(sample.split("/")[0]) == line["step"] - 1 for line in lines for sample in line["trained"])


def cases(*, core: bool) -> list[tuple[str, str]]:
    return [(victim, phase) for victim in VICTIMS for phase in PHASES if ((victim, phase) in CORE) == core]


def check(victim: str, phase: str, config: Path, undisturbed: str, folder: Path, *overrides: str) -> None:
    command = ["-m", "tests.support.fault_driver", victim, phase, str(config), f"run.dir={folder}", *overrides]
    if victim == "node":
        with nodes.worker_nodes() as environment:
            output = finished([*command, nodes.SETTING], environment=environment)
    else:
        output = finished(command, status=-signal.SIGKILL if victim == "driver" else 0)
    if f"killed {victim}" not in output:  # the run's whole output, which an assertion would shorten
        pytest.fail(f"nobody was killed:\n{output}")
    if victim == "driver":
        finished(["-m", "learner.train", str(config), f"run.dir={folder}", "--resume"])
    assert_every_sample_once(folder / "tiny")
    assert weights_of(folder / "tiny") == undisturbed


@pytest.mark.parametrize(("victim", "phase"), cases(core=True))
def test_the_core_of_the_matrix(victim: str, phase: str, config: Path, undisturbed: str, tmp_path: Path) -> None:
    check(victim, phase, config, undisturbed, tmp_path)


def test_a_worker_joins_at_a_step_boundary_and_leaves_at_another(
    config: Path, undisturbed: str, tmp_path: Path
) -> None:
    command = ["-m", "tests.support.fault_driver", "extra", "worker", str(config), f"run.dir={tmp_path}", nodes.SETTING]
    with nodes.worker_nodes() as environment:
        output = finished([*command, "rollout.workers=1", "rollout.max_workers=2"], environment=environment)
    assert "its node is being drained" in output
    run = tmp_path / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/workers"] for line in lines if "rollout/workers" in line] == [1, 2, 1]
    assert not any(line.get("rollout/restarts") for line in lines)
    events = read_trace(run / "trace.json")
    tracks = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"worker 0", "worker 1"} <= tracks
    assert_every_sample_once(run)
    assert weights_of(run) == undisturbed


@pytest.mark.matrix
@pytest.mark.parametrize(("victim", "phase"), cases(core=False))
def test_the_rest_of_the_matrix(victim: str, phase: str, config: Path, undisturbed: str, tmp_path: Path) -> None:
    check(victim, phase, config, undisturbed, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("phase", ["accumulation", "step", "sync", "checkpoint"])
def test_one_rank_of_two(phase: str, config: Path, undisturbed_of_two_ranks: str, tmp_path: Path) -> None:
    """The other waits in a collective for one that is dead."""
    check("last rank", phase, config, undisturbed_of_two_ranks, tmp_path, *TWO_RANKS)


@pytest.mark.matrix
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(config: Path, undisturbed: str, tmp_path: Path) -> None:
    output = finished(["-m", "tests.support.fault_driver", "disk", "checkpoint", str(config), f"run.dir={tmp_path}"])
    run = tmp_path / "tiny"
    assert re.search(r"step-000002 was not written: .*going on without it", output)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000001", "step-000003"]
    assert weights_of(run) == undisturbed
