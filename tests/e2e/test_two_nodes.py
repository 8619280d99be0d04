"""A whole run on a cluster of two nodes that share no loopback device: every address must be a node's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.namespaces import missing_rights, two_namespaces
from tests.support.ray_nodes import ray_cluster
from tests.support.runs import finish, started_run, write_run

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(missing_rights() is not None, reason=str(missing_rights())),
]


def test_workers_on_two_nodes_reach_the_teacher_and_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """Each node claims a GPU for one worker. Wherever the teacher and the learner are placed, one worker is remote."""
    config = write_run(
        tmp_path,
        tiny_model,
        teacher={"kind": "live", "threads": 1},
        rollout={"workers": 2, "gpus_per_worker": 1},
        learner={"steps": 2},
        eval={"every": 0},
    )
    with (
        two_namespaces() as namespaces,
        ray_cluster(worker_nodes=1, gpus=(1, 1), namespaces=namespaces) as environment,
        started_run(config, environment=environment, prefix=namespaces[0].prefix) as process,
    ):
        finish(process)
    summary = json.loads((tmp_path / "runs/tiny/summary.json").read_text())
    assert (summary["outcome"], summary["steps"]) == ("finished", 2)
