"""Contents of ``pip install .``: the code of five packages, files of the report page, the entry points."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email.parser import Parser

import pytest

from tests.support.imports import PACKAGES
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the tree, by the installed setuptools."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "opcd_start.py"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_every_module_is_in_it_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Configurations, manifests and dashboards are not installed: users read and change them in the repository."""
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    report = {
        path.relative_to(ROOT).as_posix()
        for folder in ("assets", "templates")
        for path in (ROOT / "deploy/report" / folder).iterdir()
    }
    assert {path.rpartition(".")[2] for path in report} == {"css", "js", "html", "svg"}
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    templates = {f"learner/experience/templates/{name}.txt" for name in ("extract", "extract_game", "context")}
    assert inside == {"opcd_start.py", "deploy/starter/template.yaml"} | modules | report | templates
    assert {name.split("/")[0] for name in inside} == {"opcd_start.py", *PACKAGES}


def test_vllm_and_the_shell_find_their_entries(wheel: zipfile.ZipFile) -> None:
    entries = ConfigParser()
    entries.read_string(read(wheel, "entry_points.txt"))
    assert dict(entries["console_scripts"]) == PROJECT["scripts"]
    assert dict(entries["vllm.general_plugins"]) == PROJECT["entry-points"]["vllm.general_plugins"]
    for section in entries.sections():
        for target in entries[section].values():
            assert target.partition(":")[0].replace(".", "/") + ".py" in wheel.namelist()


def test_the_licence_and_the_version_are_stated(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("opcd", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert read(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def read(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [found for found in wheel.namelist() if found.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()
