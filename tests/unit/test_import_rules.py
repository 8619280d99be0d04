"""Who may import whom: services meet only in ``common``, and ``common`` is light enough for any process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("rollout_workers", "teacher_server", "learner")
PACKAGES = ("common", *SERVICES, "deploy")
ENGINES = ("ray", "vllm", "deepspeed")
HEAVY = (*ENGINES, "torch", "transformers")

WIRING = (
    "learner/services.py",
    "learner/teachers.py",
    "learner/games.py",
    "learner/experience.py",
    "learner/experience_pool.py",
)
"""The files that know the other services, and what of them it may know."""
WIRED = (
    "rollout_workers.actor",
    "rollout_workers.lost",
    "rollout_workers.playing",
    "rollout_workers.pool",
    "rollout_workers.environments.registry",
    "rollout_workers.experience",
    "teacher_server.actor",
    "teacher_server.client",
)
ENTRY_POINTS = (
    "learner.train",
    "learner.experience_run",
    "learner.inputs",
    "learner.placement",
    "teacher_server.serve",
    "teacher_server.auth",
)
"""What ``deploy`` starts, the reading of a run's data and the sum of its GPUs that a dry run and a submission repeat,
and the making of keys."""
SIMULATION = "deploy/simulate.py"
RULES_OF_THE_LOOP = ("learner.filling", "learner.staleness", "rollout_workers.dispatch")
"""Pure classes by which the loop decides, and the simulator with it."""


@dataclass(frozen=True)
class Import:
    """One import statement: where it stands, what it names, whether it runs when the module is imported."""

    file: str
    line: int
    module: str
    at_module_level: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(source: str, file: str) -> list[Import]:
    """All imports of one file; those for the type checker alone are none. ``from p import m`` names ``p.m``."""
    return list(_walk(ast.parse(source), file, at_module_level=True))


def _walk(node: ast.AST, file: str, *, at_module_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, child.lineno, alias.name, at_module_level)
        elif isinstance(child, ast.ImportFrom):
            base = _base(child, file)
            for alias in child.names:
                yield Import(file, child.lineno, f"{base}.{alias.name}", at_module_level)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for alternative in child.orelse:
                yield from _walk(alternative, file, at_module_level=at_module_level)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, file, at_module_level=at_module_level and not inside)


def _base(statement: ast.ImportFrom, file: str) -> str:
    """The absolute name of what a ``from`` import reads from."""
    if not statement.level:
        return statement.module or ""
    package = list(Path(file).parent.parts)
    above = package[: len(package) - statement.level + 1]
    return ".".join([*above, *([statement.module] if statement.module else [])])


def fault(found: Import) -> str | None:
    """Why an import is against the rules; None where it is not."""
    owner = found.file.partition("/")[0]
    if owner == "common":
        if found.package in ENGINES:
            return "common imports no engine"
        if found.package in HEAVY and found.at_module_level:
            return "common imports torch and transformers inside functions only"
        if found.package in PACKAGES and found.package != "common":
            return "common knows nobody"
    if owner in SERVICES and found.package in (*SERVICES, "deploy") and found.package != owner:
        if found.file in WIRING and _within(found.module, WIRED):
            return None
        return "services know each other only through common"
    if found.file == SIMULATION and _within(found.module, RULES_OF_THE_LOOP):
        return None
    if owner == "deploy" and found.package in SERVICES and not _within(found.module, ENTRY_POINTS):
        return "deploy imports only the services' entry points"
    return None


def _within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def all_imports() -> list[Import]:
    found: list[Import] = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found += imports_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    return found


def test_every_import_keeps_the_rules() -> None:
    imports = all_imports()
    assert any(found.file in WIRING and found.package == "rollout_workers" for found in imports)  # the reader reads
    assert [f"{found}: {why}" for found in imports if (why := fault(found))] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("common/x.py", "import ray"),
        ("common/x.py", "def f():\n    from vllm import LLM"),
        ("common/x.py", "import torch.nn as nn"),
        ("common/x.py", "try:\n    import transformers\nexcept ImportError:\n    pass"),
        ("common/x.py", "class A:\n    import torch"),
        ("common/x.py", "from learner.losses import Form"),
        ("learner/x.py", "import teacher_server.client"),
        ("learner/x.py", "def f():\n    from rollout_workers import actor"),
        ("learner/x.py", "from ..teacher_server import client"),
        ("learner/services.py", "from rollout_workers.engine import RolloutEngine"),
        ("rollout_workers/environments/x.py", "from learner.losses import Form"),
        ("teacher_server/x.py", "from deploy.prepare import prepare_smollm2"),
        ("deploy/x.py", "from learner.engine import LearnerEngine"),
        ("deploy/x.py", "from learner.staleness import StalenessTracker"),
        ("deploy/simulate.py", "from learner.stream import Stream"),
    ],
)
def test_a_forbidden_import_is_seen(file: str, source: str) -> None:
    assert [found for found in imports_of(source, file) if fault(found)]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("common/x.py", "def f():\n    import torch"),
        ("common/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("common/x.py", "from . import schema"),
        ("learner/services.py", "from teacher_server.client import TeacherClient"),
        ("learner/x.py", "import learner.losses, common.schema, torch"),
        ("rollout_workers/environments/x.py", "from ..stops import Stops"),
        ("deploy/x.py", "from learner import train"),
        ("deploy/simulate.py", "from learner.staleness import StalenessTracker"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert [found for found in imports_of(source, file) if fault(found)] == []


def loaded_by(modules: list[str]) -> set[str]:
    """Heavy packages that are in ``sys.modules`` after `modules` were imported in a fresh interpreter."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_common_loads_nothing_heavy() -> None:
    modules = [f"common.{path.stem}" for path in sorted((ROOT / "common").glob("*.py")) if path.stem != "__init__"]
    assert "common.schema" in modules
    assert loaded_by(modules) == set()


def test_the_losses_load_torch_alone() -> None:
    assert loaded_by(["learner.losses"]) == {"torch"}


def test_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by(["deploy.cli"]) == set()
