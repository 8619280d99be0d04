"""The Dockerfiles and the compose file without a Docker engine: lint, copied files, started commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config.loader import load_config, load_teacher_config
from tests.support.paths import ROOT

DOCKER = ROOT / "deploy" / "docker"
RECIPES = sorted(DOCKER.glob("*.Dockerfile"))
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """Return (instruction, arguments) with continued lines joined."""
    joined = re.sub(r"\\\n", " ", "\n".join(x for x in recipe.read_text().splitlines() if not x.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def lint(recipe: Path) -> str:
    done = subprocess.run([HADOLINT, recipe], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(recipe: Path) -> None:
    assert lint(recipe) == ""


def test_the_lint_finds_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(RECIPES[0].read_text().replace("--no-install-recommends", ""))
    assert "DL3015" in lint(bad)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_image_runs_as_the_user_that_the_pods_name(recipe: Path) -> None:
    last = [argument for word, argument in instructions(recipe) if word == "USER"][-1]
    assert last == "10001:10001"
    assert "--uid 10001" in recipe.read_text()
    kept = instructions(recipe)
    assert [word for word, _ in kept[kept.index(("USER", last)) + 1 :]] == ["ENTRYPOINT", "CMD"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_packages_come_from_the_locks_alone(recipe: Path) -> None:
    copied = [word for kind, line in instructions(recipe) if kind == "COPY" for word in line.split()[:-1]]
    locks = [word for word in copied if word.startswith("deploy/requirements/")]
    assert locks
    for lock in locks:
        pins = [line for line in (ROOT / lock).read_text().splitlines() if line and not line.startswith("#")]
        assert [pin for pin in pins if not re.match(r"^[A-Za-z0-9._-]+==[A-Za-z0-9.+]+$", pin)] == []
    text = recipe.read_text()
    assert len(re.findall(r"pip install", text)) == len(re.findall(r"--requirement|--no-deps /dist", text))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_copied_files_are_in_the_context(recipe: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for kind, line in instructions(recipe):
        sources = [] if kind != "COPY" or "--from" in line else line.split()[:-1]
        for source in sources:
            assert (ROOT / source).exists()
            assert source == "." or source.split("/")[0] in kept


def test_the_context_holds_the_files_of_the_wheel() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert kept >= {"common", "rollout_workers", "teacher_server", "learner", "deploy", "pyproject.toml"}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


class Closed(BaseModel):
    """Base of the part of the Compose Specification in use; no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True)


Duration = Annotated[str, Field(pattern=r"^\d+(s|m|h)$")]


class Build(Closed):
    context: str
    dockerfile: str


class Healthcheck(Closed):
    test: list[str]
    interval: Duration
    timeout: Duration
    retries: int
    start_period: Duration


class DependsOn(Closed):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Service(Closed):
    image: str
    build: Build | None = None
    init: bool = False
    user: str | None = None
    environment: dict[str, str] = {}
    cap_drop: list[str]
    security_opt: list[str]
    shm_size: Annotated[str, Field(pattern=r"^\d+(kb|mb|gb)$")] | None = None
    volumes: list[str]
    ports: list[str] = []
    profiles: list[str] = []
    command: list[str] = []
    restart: Literal["no", "always", "on-failure", "unless-stopped"] = "no"
    stop_grace_period: Duration | None = None
    healthcheck: Healthcheck | None = None
    depends_on: dict[str, DependsOn] = {}


def services() -> dict[str, dict[str, Any]]:
    tree = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert {key for key in tree if not key.startswith("x-")} == {"name", "services"}
    return tree["services"]


def test_every_field_of_the_compose_file_is_known() -> None:
    for service in services().values():
        checked = Service.model_validate(service)
        assert checked.cap_drop == ["ALL"]
        assert checked.security_opt == ["no-new-privileges:true"]
        assert checked.user is not None or checked.image.startswith("grafana/")  # grafana's image has its own
        assert all(port.startswith("127.0.0.1:") for port in checked.ports)
        assert set(checked.depends_on) <= set(services())
        for volume in checked.volumes:
            source = (DOCKER / volume.split(":")[0]).resolve()
            assert source.is_file() or source.relative_to(ROOT).parts[0] in ("models", "runs", "keys")
    with pytest.raises(ValidationError):
        Service.model_validate({**services()["teacher"], "healthchecks": {}})


def test_started_commands_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # as in the image, whose folder has deploy/configs
    command, path, *overrides = services()["run"]["command"]
    assert command == "train"
    run = load_config(path, overrides)
    command, path, *overrides = services()["teacher"]["command"]
    assert command == "teacher"
    teacher = load_teacher_config(path, overrides).teacher
    assert run.teacher.url == f"http://teacher:{teacher.port}"
    assert run.student.model == teacher.model
    assert f"127.0.0.1:{teacher.port}/readyz" in services()["teacher"]["healthcheck"]["test"][-1]
    scraped = (ROOT / "deploy/dashboards/prometheus.yaml").read_text()
    assert f"run:{run.run.metrics_port}" in scraped
    assert f"teacher:{teacher.port}" in scraped
