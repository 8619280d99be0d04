"""The job of a submitted run, the refusals, and ``ray job submit``'s own reading of the printed command."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.cli import submit as ray_job_submit
from typer.testing import CliRunner, Result

from common.config.model import Config, ConfigError, TeacherConfig
from deploy.cli import submit as cli_submit
from deploy.cli.main import app
from deploy.submit import cluster as submit_cluster
from deploy.submit.cluster import Cluster, shipped_files
from deploy.submit.files import SECRETS, file_faults, named_files
from deploy.submit.submit import EXCLUDES, Job, plain_variable, plan, ray_command, secret_variable
from learner.cluster.placement import PlacementError
from tests.support.configs import config_of

ADDRESS = "http://127.0.0.1:1"
"""No server listens on this port."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project to submit: data, files that must not be uploaded, and an empty wheel cache."""
    here = tmp_path / "project"
    excluded = ("models/m/config.json", "runs/old/metrics.jsonl", "team.key", "ca.pem", ".env", "notes/secret.txt")
    for name in ("data/train.jsonl", *excluded):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("{}")
    (here / ".gitignore").write_text("notes/\n")
    (here / "run.yaml").write_text(
        "run: {name: mine, dir: /shared/runs}\nstudent: {model: /shared/m}\n"
        "context: {text: c}\ndata: {train: data/train.jsonl}\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in submit_cluster.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(here)
    return here


def job_of(folder: Path, **changes: Any) -> Job:
    arguments: dict[str, Any] = {
        "config": folder / "run.yaml",
        "overrides": ["learner.lr=1e-5", "data.note=a b"],
        "run_name": "mine",
        "working_dir": folder,
        "wheel": Path("/cache/opcd-1-py3-none-any.whl"),
        "submission_id": "mine-1",
    }
    return plan(**(arguments | changes))


def submitted(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["submit", "run.yaml", "--address", ADDRESS, *arguments])


def test_a_job_runs_the_learner_on_the_uploaded_file(folder: Path) -> None:
    job = job_of(folder, resume=True, accept_changes=True, secrets=["WANDB_API_KEY"], variables=["NCCL_DEBUG=INFO"])
    command = "python -m learner.train run.yaml learner.lr=1e-5 'data.note=a b' --resume --accept-changes"
    assert list(job.entrypoint) == shlex.split(command)
    assert job.runtime_env["py_modules"] == ["/cache/opcd-1-py3-none-any.whl"]
    assert job.runtime_env["excludes"] == list(EXCLUDES)  # what `shipped_files` asks Ray's packer to leave out
    # Ray's own 3 seconds before SIGKILL are too short for a run that ends in order.
    assert job.runtime_env["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "600",
        "NCCL_DEBUG": "INFO",
        "WANDB_API_KEY": "${WANDB_API_KEY}",
    }


@pytest.mark.parametrize(
    ("flag", "word"), [("resume", "--resume"), ("accept_changes", "--accept-changes"), ("overwrite", "--overwrite")]
)
def test_each_flag_is_its_own(folder: Path, flag: str, word: str) -> None:
    (passed,) = [one for one in job_of(folder, **{flag: True}).entrypoint if one.startswith("--")]
    assert passed == word
    assert not [one for one in job_of(folder).entrypoint if one.startswith("--")]


def test_the_folder_is_named_whatever_the_path_to_it(folder: Path) -> None:
    """Ray's command reads a relative path from its current folder."""
    assert job_of(folder, working_dir=Path()).working_dir == folder


def test_ray_reads_the_printed_command_as_what_is_sent(folder: Path) -> None:
    """Parsed by a shell's rules, then by the parser of ``ray job submit`` itself."""
    job = job_of(folder, secrets=["WANDB_API_KEY=TEAM_KEY"])
    words = shlex.split(ray_command(job, ADDRESS, token_file=Path("/a b/token"), follow=True))
    assert words[:5] == ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/a b/token", "ray", "job", "submit"]
    read = ray_job_submit.make_context("submit", words[5:]).params
    assert read["entrypoint"] == job.entrypoint
    assert read["address"] == ADDRESS
    assert read["submission_id"] == "mine-1"
    assert read["working_dir"] == str(folder)
    assert read["no_wait"] is False
    assert json.loads(read["runtime_env_json"]) == job.runtime_env
    assert json.loads(read["metadata_json"]) == {"opcd_run": "mine", "opcd_config": "run.yaml"}
    assert ray_job_submit.make_context("submit", shlex.split(ray_command(job, ADDRESS))[3:]).params["no_wait"] is True


def test_secrets_are_names_that_the_nodes_fill_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert secret_variable("WANDB_API_KEY") == ("WANDB_API_KEY", "${WANDB_API_KEY}")
    assert secret_variable("HF_TOKEN=TEAM_TOKEN") == ("HF_TOKEN", "${TEAM_TOKEN}")
    for value in ("WANDB_API_KEY=hunter2", "WANDB_API_KEY=", "hunter2", "A B", ""):
        with pytest.raises(ConfigError) as refused:
            secret_variable(value)
        assert "hunter2" not in str(refused.value)


def test_ray_fills_secrets_in_from_the_nodes_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import update_envs

    monkeypatch.setenv("TEAM_TOKEN", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "")
    update_envs(dict([secret_variable("HF_TOKEN=TEAM_TOKEN")]))
    assert os.environ["HF_TOKEN"] == "hunter2"


def test_values_that_look_like_secrets_are_not_sent() -> None:
    assert plain_variable("NCCL_DEBUG=a=b") == ("NCCL_DEBUG", "a=b")
    for name in ("WANDB_API_KEY", "DB_PASSWORD", "HF_TOKEN", "CLIENT_SECRET", "AWS_CREDENTIALS"):
        with pytest.raises(ConfigError, match=f"--secret {name}"):
            plain_variable(f"{name}=hunter2")
    for text in ("WANDB_API_KEY=hunter2", "name=hunter2", "NAME"):
        with pytest.raises(ConfigError) as refused:
            plain_variable(text)
        assert "hunter2" not in str(refused.value)


def test_a_file_outside_of_the_upload_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--working-dir names another"):
        job_of(folder, config=tmp_path / "other.yaml")
    with pytest.raises(ConfigError, match="letters, digits"):
        job_of(folder, submission_id="a b")


def test_rays_packer_leaves_out_models_runs_keys_and_ignored_files(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in shipped_files(folder)}
    assert names == {".gitignore", "data/train.jsonl", "run.yaml"}


def test_every_file_of_keys_is_a_secret() -> None:
    """By its name, so that a new one is no input that the upload contains."""
    keys = {name for name in TeacherConfig.model_fields if name.endswith(("key", "key_file", "keys_file"))}
    assert keys == set(SECRETS)


def test_every_path_of_a_configuration_is_sorted_by_its_use() -> None:
    config = config_of(
        run={"name": "r", "dir": "runs"},
        teacher={
            "url": "http://t",
            "client_key_file": "team.key",
            "ca_file": "ca.pem",
            "server_keys_file": "keys",
            "tls_key": "tls.key",
            "tls_certificate": "tls.pem",
        },
        sync={"backend": "file", "folder": "weights"},
        teachers={"large": {"model": "models/l"}},
        context={"file": "c.txt"},
        data={"train": "t", "valid": "game:FrozenLake?rows=8", "eval": "e"},
        eval={"ood": {"chat": "o"}},
    )
    assert {file.key: file.use for file in named_files(config)} == {
        "run.dir": "output",
        "student.model": "model",
        "teacher.client_key_file": "secret",
        "teacher.ca_file": "input",
        "teacher.server_keys_file": "secret",
        "teacher.tls_key": "secret",
        "teacher.tls_certificate": "input",
        "sync.folder": "output",
        "teachers.large.model": "model",
        "context.file": "input",
        "data.train": "input",
        "data.eval": "input",
        "eval.ood.chat": "input",
    }


def faults_of(folder: Path, **sections: Any) -> list[str]:
    shipped = shipped_files(folder)
    settings = {"run": {"name": "r", "dir": "/runs"}, "data": {"train": "data/train.jsonl"}, **sections}
    config: Config = config_of(**settings)
    return file_faults(config, folder, lambda path: cli_submit.is_shipped(path, shipped))


def test_what_a_job_would_not_find_is_named_with_the_remedy(folder: Path) -> None:
    assert faults_of(folder) == []
    assert faults_of(folder, student={"model": "some/hub-name"}) == []
    assert faults_of(folder, context={"file": "/on/the/cluster.txt"}) == []
    for key, sections, part in (
        ("run.dir", {"run": {"name": "r"}}, "run.dir=/shared/runs"),
        (
            "teacher.client_key_file",
            {"teacher": {"url": "http://t", "client_key_file": "team.key"}},
            "secrets are not uploaded",
        ),
        ("student.model", {"student": {"model": "models/m"}}, "student.model=/shared/models/m"),
        ("context.file", {"context": {"file": "notes/secret.txt"}}, "left out of the upload"),
        ("context.file", {"context": {"file": "../up.txt"}}, "outside the submitted folder"),
        ("data.train", {"data": {"train": "none.jsonl"}}, "no such file"),
    ):
        (fault,) = faults_of(folder, **sections)
        assert fault.startswith(f"{key} is `")
        assert part in fault


def test_relative_paths_count_from_the_submitted_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert faults_of(folder) == []


def test_print_shows_the_command_without_a_cluster_and_without_secrets(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    token = folder.parent / "token"
    token.write_text("hunter2")
    named = ["--secret", "WANDB_API_KEY", "--token-file", str(token)]
    result = submitted("--print", "--id", "j", *named, "learner.lr=1e-5")
    assert result.exit_code == 0, result.output
    assert "hunter2" not in result.output
    words = shlex.split(result.stdout)
    runtime_env = json.loads(words[words.index("--runtime-env-json") + 1])
    assert Path(runtime_env["py_modules"][0]).is_file()
    assert words[-2:] == ["run.yaml", "learner.lr=1e-5"]


def test_refusals_are_lines_of_their_own(folder: Path) -> None:
    result = submitted("run.dir=runs", "student.model=models/m")
    assert result.exit_code == 2
    assert [line.split(" is ")[0] for line in result.stderr.splitlines()] == ["opcd: run.dir", "student.model"]
    assert "did you mean learner.steps?" in submitted("learner.stesp=3").stderr


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_an_address_that_a_variable_overrides_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ray's client would go where the variable says."""
    monkeypatch.setenv(name, "http://elsewhere:8265")
    assert f"{name} is http://elsewhere:8265" in submitted().stderr
    monkeypatch.setenv(name, ADDRESS)  # the same: no doubt where to go
    assert "Failed to connect" in submitted().stderr
    with pytest.raises(ConfigError, match="http://HEAD:8265"):
        Cluster("ray://x:10001")


def test_a_cluster_that_is_not_there_is_one_line(folder: Path) -> None:
    result = submitted()
    assert result.exit_code == 2
    assert result.stderr == f"opcd: Failed to connect to Ray at address: {ADDRESS}.\n"


def test_a_run_that_the_cluster_cannot_hold_is_not_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_cluster, "JobSubmissionClient", lambda address, headers: None)
    monkeypatch.setattr(Cluster, "gpus", lambda self: {"10.0.0.1#abcdef": 1.0})
    sent: list[Job] = []
    monkeypatch.setattr(Cluster, "submit", lambda self, job: sent.append(job) or job.submission_id)
    result = submitted("learner.gpus_per_rank=1", "rollout.gpus_per_worker=1")
    assert result.exit_code == 2
    assert (
        "the run asks for 2 GPUs, 1 of them on one node for worker 0; free are 1 (10.0.0.1#abcdef: 1)" in result.stderr
    )
    assert sent == []
    assert submitted("learner.gpus_per_rank=1", "--id", "fits").stdout == "fits\n"
    assert submitted("learner.gpus_per_rank=2", "--no-check-gpus", "--id", "forced").stdout == "forced\n"
    waits = ("learner.gpus_per_rank=2", "run.placement_timeout_s=60")  # for nodes that an autoscaler has yet to start
    assert submitted(*waits, "--id", "waits").stdout == "waits\n"
    assert [job.submission_id for job in sent] == ["fits", "forced", "waits"]
    with pytest.raises(PlacementError):
        Cluster(ADDRESS).check(config_of(learner={"gpus_per_rank": 2}))


@pytest.mark.parametrize("text", ["", "two words", "\u00e9"])
def test_a_token_file_without_a_token_is_refused(folder: Path, text: str) -> None:
    token = folder.parent / "token"
    token.write_text(text)
    result = submitted("--token-file", str(token))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"opcd: --token-file {token}: ")


def test_a_token_that_would_be_uploaded_is_refused(folder: Path) -> None:
    (folder / "token").write_text("hunter2")
    result = submitted("--token-file", "token")
    assert result.exit_code == 2
    assert "--token-file token would be uploaded" in result.stderr
    (folder / ".gitignore").write_text("token\n")
    assert "would be uploaded" not in submitted("--token-file", "token", "--print").output
