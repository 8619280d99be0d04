"""The wheel of a submitted job: the running code, its entry points, no requirements, named by its content."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy.submit import wheel as submit_wheel
from deploy.submit.wheel import write_wheel
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheels"))


def test_it_holds_the_running_code(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    patterns = ("*.py", "report/assets/*", "experience/templates/*.txt")
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("common", "rollout_workers", "teacher_server", "learner", "deploy")
        for pattern in patterns
        for path in (ROOT / package).rglob(pattern)
    }
    assert {Path(name).suffix for name in files} == {".py", ".css", ".js", ".txt"}
    assert files <= set(archive.namelist())
    assert all(archive.read(name) == (ROOT / name).read_bytes() for name in files)
    assert not [name for name in archive.namelist() if "__pycache__" in name]


def test_pip_installs_it_as_ray_does_and_entry_points_load(wheel: Path, tmp_path: Path) -> None:
    """``pip install --target``, without an index. Then imported as by a node's worker."""
    target = tmp_path / "target"
    options = ["-q", "--no-index", "--no-compile", str(wheel), f"--target={target}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True, capture_output=True, timeout=60)
    code = (
        "import importlib.metadata as m\n"
        "found = m.distribution('opcd')\n"
        "points = {point.name: point for point in found.entry_points}\n"
        "print(found.version, points['opcd_weight_transfer'].group, points['opcd_weight_transfer'].load().__module__)\n"
        "import rollout_workers; print(rollout_workers.__file__)\n"
        "points['opcd'].load()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(target), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    version, group, module, file = done.stdout.split()
    assert f"-{version}-" in wheel.name
    assert (group, module) == ("vllm.general_plugins", "rollout_workers.vllm_plugin.plugin")
    assert Path(file).is_relative_to(target)


def test_equal_code_is_an_equal_wheel_and_other_code_has_another_name(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray knows a wheel by its name alone: code that changed under an old name would not be sent."""
    again = write_wheel(tmp_path)
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()
    files = submit_wheel.read_packages()
    monkeypatch.setattr(
        submit_wheel, "read_packages", lambda: files | {"common/weight_sync/prefetch.py": b"changed = True\n"}
    )
    other = write_wheel(tmp_path)
    assert other.name != wheel.name
    assert zipfile.ZipFile(other).read("common/weight_sync/prefetch.py") == b"changed = True\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([again.name, other.name])


@pytest.mark.parametrize("change", ["moved", "cut elsewhere", "another entry point"])
def test_every_change_is_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    files = {"common/a.py": b"one", "common/b.py": b"two"}
    monkeypatch.setattr(submit_wheel, "read_packages", lambda: files)
    before = write_wheel(tmp_path).name
    if change == "moved":
        files["common/c.py"] = files.pop("common/b.py")
    elif change == "cut elsewhere":
        files |= {"common/a.py": b"onet", "common/b.py": b"wo"}
    else:
        entries = submit_wheel.entry_points_text
        monkeypatch.setattr(
            submit_wheel, "entry_points_text", lambda found: entries(found) + "other = deploy.cli.main:main\n"
        )
    assert write_wheel(tmp_path).name != before
