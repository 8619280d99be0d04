"""If any process of a deterministic run dies, the run still ends with bit-identical weights.

``make test`` kills one process of every kind on one node, at different phases of one run; ``make test-faults`` adds the
whole matrix.
"""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from common.telemetry.trace import read_trace
from tests.support.fault_driver import PHASES, SLOW_SCORING, VICTIMS
from tests.support.processes import assert_nothing_left, command_of
from tests.support.ray_nodes import ONE_WORKER_A_NODE, ray_cluster
from tests.support.runs import ReferenceRun, finish, metric_lines, started_run, weights_of

STEPS = 6
TWO_WORKERS = (SLOW_SCORING, "rollout.workers=2")
TWO_RANKS = ("learner.ranks=2", "learner.zero_stage=2")


def assert_same_as(expected: Path, run: Path) -> None:
    """Same weights, and each step was trained on its 8 samples: none twice, none missing."""
    lines = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    counts = Counter(sample for line in lines for sample in line["trained"])
    assert set(counts.values()) == {1}
    assert len(counts) == 8 * STEPS
    assert not any(line["failed"] for line in lines)
    assert all(int(sample.split("/")[0]) == line["step"] - 1 for line in lines for sample in line["trained"])
    assert weights_of(run) == weights_of(expected)


def assert_killed(output: str, *victims: str) -> None:
    if sorted(re.findall(r"killed ([a-z ]+) \d", output)) != sorted(victims):
        pytest.fail(f"expected to be killed: {', '.join(victims)}\n{output}")  # an assertion would shorten the output


def assert_only_agents_left(output: str) -> None:
    """Only Ray's two agents outlive a killed driver.

    They hold neither a device nor a model, and end by themselves a minute later.
    """
    (line,) = re.findall(r"processes of the driver: (.*)", output)
    processes = {int(pid) for pid in line.split()}
    agents = {pid for pid in processes if command_of(pid).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))}
    assert len(agents) == 2
    assert_nothing_left(processes - agents)


def test_every_process_is_killed_in_turn(
    reference: ReferenceRun, shared_cluster: dict[str, str], tmp_path: Path
) -> None:
    """Worker, teacher and engine are replaced within the run; after the rank the run restarts from its checkpoint;
    after the driver it is resumed by hand, with one worker on another cluster.
    """
    faults = "worker:rollout:2,teacher:scoring:2,engine:accumulation:2,rank:step:3,driver:checkpoint:4"
    here, run = f"run.dir={tmp_path}", tmp_path / "tiny"
    with started_run(reference.config, here, *TWO_WORKERS, faults=faults) as process:
        output = finish(process, status=-signal.SIGKILL)
    assert_killed(output, "worker", "teacher", "engine", "rank", "driver")
    assert_only_agents_left(output)
    assert "resuming from step 2, restart 1" in output
    with started_run(reference.config, here, "--resume", environment=shared_cluster) as process:
        output = finish(process)
    assert f"resumed from {run}/checkpoints/step-000003" in output
    assert_same_as(reference.run, run)
    through, resumed = metric_lines(reference.run), metric_lines(run)
    assert [line["weight_version"] for line in resumed] == list(range(1, STEPS + 1))
    assert [line["kl/lower_bound"] for line in resumed] == [line["kl/lower_bound"] for line in through]
    expected, found = (json.loads((path / "summary.json").read_text()) for path in (reference.run, run))
    for name in ("base", "in_context", "final", "best_on_valid", "kl_first", "kl_last", "steps"):
        assert found[name] == expected[name], name


def test_a_worker_joins_at_a_step_boundary_and_leaves_at_another(reference: ReferenceRun, tmp_path: Path) -> None:
    """The reference run with one worker, and a second one in the second step."""
    elastic = (f"run.dir={tmp_path}", "rollout.workers=1", "rollout.max_workers=2", ONE_WORKER_A_NODE)
    with (
        ray_cluster(worker_nodes=2) as environment,
        started_run(reference.config, *elastic, environment=environment, faults="extra:worker:2") as process,
    ):
        assert "its node is being drained" in finish(process)
    run = tmp_path / "tiny"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["rollout/workers"] for line in lines if "rollout/workers" in line] == [1, 2, 1, 1, 1, 1]
    assert not any(line.get("rollout/restarts") for line in lines)
    events = read_trace(run / "trace.json")
    tracks = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"worker 0", "worker 1"} <= tracks
    assert_same_as(reference.run, run)


# --- the matrix ------------------------------------------------------------------------------------------------------


def check(victim: str, phase: str, config: Path, expected: Path, folder: Path, *overrides: str) -> None:
    """Kill `victim` at `phase` of the second step; the run must end like `expected`."""
    arguments, fault = (f"run.dir={folder}", *overrides), f"{victim}:{phase}:2"
    if victim == "node":
        with (
            ray_cluster(worker_nodes=3) as environment,  # one to spare
            started_run(config, *arguments, ONE_WORKER_A_NODE, environment=environment, faults=fault) as process,
        ):
            output = finish(process)
    else:
        with started_run(config, *arguments, faults=fault) as process:
            output = finish(process, status=-signal.SIGKILL if victim == "driver" else 0)
    assert_killed(output, victim)
    if victim == "driver":
        with started_run(config, f"run.dir={folder}", "--resume") as process:
            finish(process)
    assert_same_as(expected, folder / "tiny")


@pytest.mark.matrix
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_any_process_at_any_phase(victim: str, phase: str, reference: ReferenceRun, tmp_path: Path) -> None:
    check(victim, phase, reference.config, reference.run, tmp_path, *TWO_WORKERS)


@pytest.fixture(scope="module")
def reference_of_two_ranks(reference: ReferenceRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    with started_run(reference.config, f"run.dir={folder}", *TWO_RANKS) as process:
        finish(process)
    return folder / "tiny"


@pytest.mark.matrix
@pytest.mark.parametrize("phase", ["accumulation", "step", "sync", "checkpoint"])
def test_one_rank_of_two(phase: str, reference: ReferenceRun, reference_of_two_ranks: Path, tmp_path: Path) -> None:
    """The other rank waits in a collective."""
    check("last rank", phase, reference.config, reference_of_two_ranks, tmp_path, *TWO_WORKERS, *TWO_RANKS)


@pytest.mark.matrix
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(reference: ReferenceRun, tmp_path: Path) -> None:
    settings, run = (f"run.dir={tmp_path}", "checkpoint.keep=6"), tmp_path / "tiny"
    with started_run(reference.config, *settings, faults="disk:checkpoint:2") as process:
        output = finish(process)
    assert re.search(r"step-000002 was not written: .*the run goes on without it", output)
    kept = [f"step-{step:06d}" for step in (1, 3, 4, 5, 6)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    assert_same_as(reference.run, run)
