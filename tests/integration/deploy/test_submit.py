"""Jobs on a real cluster of two nodes whose Python has not installed opcd."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner, Result

import learner.train
from common.config.loader import load_config
from common.data.contexts import context_index
from deploy.cli.main import app
from deploy.submit.cluster import Cluster, ClusterError
from deploy.submit.submit import Job, plan
from deploy.submit.wheel import write_wheel
from learner.cluster.placement import PlacementError
from tests.support.bare_cluster import BareCluster, bare_cluster
from tests.support.configs import config_of
from tests.support.games import write_games
from tests.support.runs import metric_lines, write_run
from tests.support.verdicts import accuracy_of

PROBE = """
import importlib.metadata, json, os, ray

@ray.remote(resources={"second": 1}, num_cpus=0)
def look():
    (point,) = [p for p in importlib.metadata.entry_points(group="vllm.general_plugins") if p.name.startswith("opcd")]
    import rollout_workers
    return {
        "plugin": point.load().__module__,
        "from": rollout_workers.__file__,
        "version": importlib.metadata.version("opcd"),
        "variables": {name: os.environ.get(name) for name in ("HF_TOKEN", "NCCL_DEBUG")},
        "data": os.path.exists("train.jsonl"),
    }

ray.init(log_to_driver=False)
print("LOOKED", json.dumps(ray.get(look.remote())))
"""

STOPPED = """
import signal, sys, time

def end(number, frame):
    time.sleep(3.5)  # longer than Ray waits by default
    print("ENDED IN ORDER", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
print("READY", flush=True)
time.sleep(120)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BareCluster]:
    with bare_cluster(tmp_path_factory.mktemp("bare"), TEAM_TOKEN="of-the-node") as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The submitted folder: a run whose training file has a mistake that only the job finds."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "train.jsonl").write_text('{"id": "a", "prompt": "Q"}\n{"id": "a", "prompt": "Q"}\n')
    (folder / "probe.py").write_text(PROBE)
    (folder / "stopped.py").write_text(STOPPED)
    (folder / "run.yaml").write_text(
        "run: {name: mine, dir: /nowhere}\nstudent: {model: /nowhere/m}\ncontext: {text: c}\n"
        "data: {train: train.jsonl}\n"
    )
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheels"))


def script_job(project: Path, wheel: Path, name: str) -> Job:
    """A job that runs a script of the folder instead of a run."""
    job = plan(
        config=project / "run.yaml",
        overrides=[],
        run_name="mine",
        working_dir=project,
        wheel=wheel,
        submission_id=name,
        secrets=["HF_TOKEN=TEAM_TOKEN"],
        variables=["NCCL_DEBUG=WARN"],
    )
    return replace(job, entrypoint=("python", f"{name}.py"))


def opcd(cluster: BareCluster, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--address", cluster.address, "--token-file", str(cluster.token_file)])


def test_runs_on_nodes_that_have_not_installed_opcd(
    cluster: BareCluster, project: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three jobs at a time: a look around on the second node, a run by the command line, one that is stopped."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(project)
    with pytest.raises(ClusterError, match=r"[Aa]uthentication"):
        Cluster(cluster.address)
    jobs = Cluster(cluster.address, cluster.token_file)
    for name in ("probe", "stopped"):
        assert jobs.submit(script_job(project, wheel, name)) == name

    run = opcd(cluster, "submit", "run.yaml", "--id", "run", "--follow")
    assert run.exit_code == 2, run.output  # the run's own
    assert run.stdout.startswith("run\n")
    assert "opcd: data.train: train.jsonl:2: id 'a' was already used" in run.stdout

    printed: list[str] = []
    assert jobs.follow("probe", printed.append) == 0
    (line,) = [line for line in "".join(printed).splitlines() if line.startswith("LOOKED ")]
    seen = json.loads(line.removeprefix("LOOKED "))
    assert seen["plugin"] == "rollout_workers.vllm_plugin.plugin"
    assert "py_modules_files" in seen["from"]  # Ray's folder, not this checkout
    assert f"-{seen['version']}-" in wheel.name
    assert seen["variables"] == {"HF_TOKEN": "of-the-node", "NCCL_DEBUG": "WARN"}
    assert seen["data"] is True

    assert "READY" in jobs.logs("stopped")
    assert opcd(cluster, "jobs", "stop", "stopped").stdout == "stopped: stopping\n"
    assert opcd(cluster, "jobs", "logs", "stopped", "--follow").exit_code == 130
    assert "ENDED IN ORDER" in opcd(cluster, "jobs", "logs", "stopped").stdout
    listed = opcd(cluster, "jobs", "list").stdout
    for words in (("run", "mine", "FAILED"), ("probe", "mine", "SUCCEEDED"), ("stopped", "mine", "STOPPED")):
        assert any(all(word in line for word in words) for line in listed.splitlines()), listed


CONTEXTS = {"rules": "P is you, G the goal, H a hole.", "hint": "Keep away from H, and reach G by the shortest way."}


@dataclass(frozen=True)
class Submitted:
    """A run that a job has trained to its end, and what ``opcd submit`` printed."""

    result: Result
    run: Path
    address: str


@pytest.fixture(scope="module")
def submitted(cluster: BareCluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """Games under contexts of a pool, and questions that a module of the submitted folder grades."""
    folder = tmp_path_factory.mktemp("submitted")
    project, runs = folder / "project", folder / "runs"
    project.mkdir()
    (project / "my_task.py").write_text("def grade(answer, expected):\n    return answer == expected\n")
    write_run(
        project,
        tiny_model,
        context={"text": None, "pool": str(project / "pool.jsonl")},
        rollout={"batch_size": 4, "max_tokens": 8, "stop": []},
        environment={"max_turns": 3},
        learner={"steps": 2, "micro_batch_tokens": 1024},
        eval={"every": 0, "grader": "my_task:grade"},
        data={"valid": None},
    )
    questions = (project / "eval.jsonl").read_text()
    write_games(project, {"history": True})
    with (project / "eval.jsonl").open("a") as rows:
        rows.write("\n" + questions)
    (project / "pool.jsonl").write_text("\n".join(json.dumps({"id": n, "text": t}) for n, t in CONTEXTS.items()))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(project)
        result = opcd(cluster, "submit", "run.yaml", f"run.dir={runs}", "--id", "whole", "--follow")
    assert result.exit_code == 0, result.output
    return Submitted(result, runs / "tiny", cluster.address)


def test_a_run_that_is_submitted_trains_to_its_end(submitted: Submitted) -> None:
    printed, run = submitted.result.stdout, submitted.run
    assert "step 2/2  kl " in printed
    assert "gap closed" in printed
    assert f"Ray's dashboard: {submitted.address}" in printed
    assert (run / "checkpoint/model.safetensors").exists()
    assert (run / "report.html").exists()


def test_games_are_played_under_contexts_of_a_pool(submitted: Submitted) -> None:
    run = submitted.run
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2]
    for line in lines:
        assert 1 <= line["env/turns"] <= 3
        assert 0 <= line["env/success"] <= line["env/reward"] <= 1
        assert line["mismatch/rms"] < 2e-3  # the engine's log-probs are of the very tokens that the learner read
        assert line["kl/lower_bound"] > 0
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [len(line["trained"]) for line in audit] == [4, 4]  # episodes
    by_sample = {one: name for line in audit for one, name in zip(line["trained"], line["contexts"], strict=True)}
    assert by_sample == {one: list(CONTEXTS)[context_index(0, one, 2)] for one in by_sample}
    assert [line["context/distinct"] for line in lines] == [len(set(line["contexts"])) for line in audit]
    evaluated = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {line["set"] for line in evaluated} == {"base", "in_context", "final"}
    played = [line for line in evaluated if "exchanges" in line]
    assert (len(played), len(evaluated)) == (9, 9 + 12)
    for line in played:
        assert line["context_id"] == list(CONTEXTS)[context_index(0, f"held-out/{line['id']}", 2)]
        first, *_ = line["exchanges"]
        assert "[Game]" in first["observation"]
        assert line["right"] == (line["reward"] == 1.0)
    summary = json.loads((run / "summary.json").read_text())
    final = accuracy_of([line["right"] for line in evaluated if line["set"] == "final"])
    assert summary["final"]["accuracy"] == final.accuracy


def test_a_run_that_is_no_job_has_a_ray_of_its_own(cluster: BareCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    with learner.train.cluster() as dashboard:
        assert dashboard is None
        assert len(ray.nodes()) == 1  # the other one has two


def test_what_the_cluster_lacks_is_known_before_a_run_is_sent(cluster: BareCluster, project: Path) -> None:
    jobs = Cluster(cluster.address, cluster.token_file)
    assert list(jobs.gpus().values()) == [2.0]
    jobs.check(load_config(project / "run.yaml"))
    jobs.check(config_of(learner={"ranks": 2, "gpus_per_rank": 1}))
    with pytest.raises(PlacementError, match=r"asks for 3 GPUs, 1 of them on one node for worker 0; free are 2 \("):
        jobs.check(config_of(learner={"ranks": 2, "gpus_per_rank": 1}, rollout={"gpus_per_worker": 1}))


def test_a_job_that_is_not_there_is_one_line(cluster: BareCluster) -> None:
    result = opcd(cluster, "jobs", "logs", "none")
    assert result.exit_code == 2
    assert result.stderr.startswith("opcd: Request failed with status code 404")
