"""Answers of Ray's job server as the user sees them; tests/integration/deploy/test_submit.py has a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails
from tenacity import stop_after_attempt, wait_none

from deploy.submit import cluster as submit_cluster
from deploy.submit.cluster import Cluster, ClusterError, exit_status, gpus_of, read_token
from deploy.submit.submit import Job


def test_gpus_are_counted_on_living_nodes() -> None:
    nodes: list[dict[str, object]] = [
        {"node_id": "abcdef99", "node_ip": "10.0.0.1", "state": "ALIVE", "resources_total": {"GPU": 8, "CPU": 1}},
        {"node_id": "bbbbbb99", "node_ip": "10.0.0.1", "state": "DEAD", "resources_total": {"GPU": 8}},
        {"node_id": "cccccc99", "node_ip": "10.0.0.2", "state": "ALIVE", "resources_total": {"CPU": 4}},
    ]
    assert gpus_of(nodes) == {"10.0.0.1#abcdef": 8.0}


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("STOPPED", -15, 130),
        ("SUCCEEDED", None, 0),
        ("FAILED", 0, 1),
    ],
)
def test_the_exit_status_is_that_of_the_run(status: str, code: int | None, expected: int) -> None:
    details = JobDetails(type="SUBMISSION", entrypoint="x", status=status, driver_exit_code=code)
    assert exit_status(details) == expected


def known(job_id: str, start: int, *, sent_by_opcd: bool = True) -> JobDetails:
    metadata = {"opcd_run": "mine"} if sent_by_opcd else None
    return JobDetails(
        type="SUBMISSION",
        submission_id=job_id,
        entrypoint="x",
        status="RUNNING",
        start_time=start,
        metadata=metadata,
    )


class Server:
    """A client of Ray's job server that has just started, has three jobs, and is interrupted while its log is read."""

    def __init__(self) -> None:
        self.refusals = 1

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("No available agent to submit job, please try again later.")
        return submission_id

    def list_jobs(self) -> list[JobDetails]:
        return [known("old", 1), known("else", 2, sent_by_opcd=False), known("new", 3)]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield job_id
        raise KeyboardInterrupt


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in submit_cluster.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submit_cluster, "JobSubmissionClient", lambda address, headers: Server())
    return Cluster("http://head:8265")


def test_a_head_that_has_just_started_is_waited_for(cluster: Cluster) -> None:
    assert cluster.submit(Job("mine-1", ("python",), Path(), {}, {})) == "mine-1"


def test_a_head_whose_agent_never_comes_is_told_the_remedy(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    retried = Cluster._submit.retry  # type: ignore[attr-defined]
    monkeypatch.setattr(retried, "stop", stop_after_attempt(2))
    monkeypatch.setattr(retried, "wait", wait_none())
    monkeypatch.setattr(cluster._jobs, "refusals", 9, raising=False)
    with pytest.raises(ClusterError, match=r"port \(52365\).*--dashboard-agent-listen-port") as caught:
        cluster.submit(Job("mine-1", ("python",), Path(), {}, {}))
    assert "\n" not in str(caught.value)


def test_only_our_jobs_are_listed_the_newest_first(cluster: Cluster) -> None:
    assert [job.submission_id for job in cluster.jobs()] == ["new", "old"]


def test_ctrl_c_ends_the_following_alone(cluster: Cluster) -> None:
    heard: list[str] = []
    assert cluster.follow("mine", heard.append) == 130
    assert heard == ["mine"]


def test_the_token_is_the_word_in_its_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  of-the-team\n")
    assert read_token(tmp_path / "token") == "of-the-team"
