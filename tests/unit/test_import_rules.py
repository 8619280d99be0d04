"""Import rules: services meet only in ``common``, rooms import one way, no cycle, and light modules stay light."""

from __future__ import annotations

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.imports import (
    ENGINES,
    HEAVY,
    PACKAGES,
    Import,
    all_imports,
    imports_of,
    loaded_by,
    modules_of,
)

WIRING = {
    "learner.cluster": (
        "rollout_workers.actor",
        "rollout_workers.environments.playing",
        "rollout_workers.pool",
        "teacher_server.actor",
        "teacher_server.client",
    ),
    "learner.data": ("rollout_workers.environments.registry",),
    "learner.experience": ("rollout_workers.environments.episodes",),
}
"""Rooms of the learner that know another service -> the modules they may import from it."""
ENTRY_POINTS = {
    "deploy.cli": (
        "learner.train",
        "learner.preflight",
        "learner.experience.commands",
        "teacher_server.http.serve",
        "teacher_server.http.auth",
    ),
    "deploy.inspect": ("learner.preflight",),
    "deploy.serve": ("teacher_server.http.serve",),
    "deploy.simulator": ("learner.loop.micro_batcher", "learner.loop.staleness", "rollout_workers.pool.dispatch"),
    "deploy.submit": ("learner.cluster.placement",),
}
"""Rooms of ``deploy`` -> the modules of services that they start or check with; the simulator runs the loop's rules."""
ORDER = {
    "common": [
        {"async_utils", "error_text", "files", "float32_head", "garbage", "network", "openmp"},
        {"protocol", "config", "models"},
        {"devices", "data", "telemetry", "evaluation", "weight_sync", "sizing", "import_names", "serving"},
    ],
    "learner": [
        {"errors"},
        {"trainer", "data", "publishing"},
        {"cluster"},
        {"evaluation"},
        {"loop"},
        {"preflight"},
        {"train"},
        {"experience"},
    ],
    "rollout_workers": [{"vllm_plugin", "pool"}, {"engine"}, {"environments", "answer_contexts"}, {"actor"}],
    "teacher_server": [{"backends"}, {"scoring"}, {"http"}, {"client", "actor"}],
    "deploy": [
        {"inspect", "report", "serve", "simulator", "starter", "submit", "tasks"},
        {"compare"},
        {"docs_tools", "cli"},
    ],
}
"""Rooms of each package in tiers: a room imports itself and the tiers before its own."""


def room_of(module: str) -> str:
    """``learner.loop`` for ``learner.loop.run``; ``learner.train`` for the module itself."""
    return ".".join(module.split(".")[:2])


def fault(found: Import) -> str | None:
    """Explain why an import breaks the rules; None if it breaks none."""
    owner, room = found.file.partition("/")[0], room_of(found.importer)
    if owner == "common":
        if found.package in ENGINES:
            return "common imports no engine"
        if found.package in HEAVY and found.at_module_level:
            return "common imports torch and transformers inside functions only"
        if found.package in PACKAGES and found.package != "common":
            return "common imports no other package"
    if found.package not in PACKAGES:
        return None
    if found.package != owner:
        if found.package == "common":
            return None
        if owner == "deploy":
            allowed = ENTRY_POINTS.get(room, ())
            return None if _within(found.module, allowed) else "deploy imports only the services' entry points"
        return None if _within(found.module, WIRING.get(room, ())) else "services meet only in common"
    return _against_order(owner, room, room_of(found.module))


def _against_order(package: str, room: str, imported: str) -> str | None:
    tiers = {f"{package}.{name}": number for number, tier in enumerate(ORDER[package]) for name in tier}
    if room == imported or package in (room, imported):
        return None  # the package's own __init__.py
    if room not in tiers or imported not in tiers:
        return f"{room} or {imported} has no place in the order of rooms"
    return None if tiers[imported] < tiers[room] else f"{room} may not import {imported}"


def _within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def test_every_import_keeps_the_rules() -> None:
    imports = all_imports()
    assert any(found.package == "rollout_workers" for found in imports if found.file.startswith("learner/"))
    assert [f"{found}: {why}" for found in imports if (why := fault(found))] == []


def test_every_room_has_a_place_in_the_order() -> None:
    for package, tiers in ORDER.items():
        rooms = {room_of(module).partition(".")[2] for module in modules_of(package) if "." in module}
        assert rooms == set().union(*tiers)


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions count too."""
    modules = {module for package in PACKAGES for module in modules_of(package)}
    graph: dict[str, set[str]] = defaultdict(set)
    for found in all_imports():
        imported = found.module
        while imported and imported not in modules:  # the name of a function or class in its module
            imported = imported.rpartition(".")[0]
        if imported and imported != found.importer:
            graph[found.importer].add(imported)
    assert cycle_in(graph) is None


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules of one import cycle; None if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def test_a_cycle_is_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}}) is None


def test_test_modules_import_helpers_only() -> None:
    found = [one for one in all_imports(("tests",)) if one.package == "tests"]
    assert len(found) > 50
    shared = ("tests.support", "tests.benchmarks", "tests.gpu")
    assert [str(one) for one in found if not _within(one.module, shared)] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("common/x.py", "import ray"),
        ("common/x.py", "def f():\n    from vllm import LLM"),
        ("common/x.py", "import torch.nn as nn"),
        ("common/x.py", "try:\n    import transformers\nexcept ImportError:\n    pass"),
        ("common/x.py", "class A:\n    import torch"),
        ("common/data/x.py", "from learner.trainer.losses import Form"),
        ("common/config/x.py", "from common.data.rows import Row"),
        ("learner/loop/x.py", "import teacher_server.client"),
        ("learner/evaluation/x.py", "from learner.loop.training_loop import TrainingLoop"),
        ("learner/cluster/x.py", "def f():\n    from learner import train"),
        ("learner/trainer/x.py", "from learner.data.samples import SampleSource"),
        ("learner/trainer/x.py", "def f():\n    from rollout_workers import actor"),
        ("learner/loop/x.py", "from ...teacher_server import client"),
        ("learner/cluster/services.py", "from rollout_workers.engine.engine import RolloutEngine"),
        ("rollout_workers/environments/x.py", "from learner.trainer.losses import Form"),
        ("rollout_workers/pool/x.py", "from rollout_workers.engine import engine"),
        ("teacher_server/http/x.py", "from deploy.tasks.gguf import prepare_smollm2"),
        ("teacher_server/backends/x.py", "from teacher_server.scoring.service import TeacherService"),
        ("deploy/inspect/x.py", "from learner.trainer.engine import LearnerEngine"),
        ("deploy/cli/x.py", "from learner.loop.staleness import StalenessTracker"),
        ("deploy/simulator/simulate.py", "from learner.loop.training_loop import RolloutPipeline"),
        ("learner/new/x.py", "from learner.errors import RunError"),
    ],
)
def test_a_forbidden_import_is_seen(file: str, source: str) -> None:
    assert [found for found in imports_of(source, file) if fault(found)]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("common/data/x.py", "def f():\n    import torch"),
        ("common/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("common/protocol/x.py", "from . import schema"),
        ("learner/cluster/services.py", "from teacher_server.client import TeacherClient"),
        ("learner/trainer/x.py", "import learner.trainer.losses, common.protocol.schema, torch"),
        ("rollout_workers/environments/x.py", "from ..engine import engine"),
        ("deploy/cli/x.py", "from learner import train"),
        ("deploy/simulator/simulate.py", "from learner.loop.staleness import StalenessTracker"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert [found for found in imports_of(source, file) if fault(found)] == []


def test_common_loads_nothing_heavy() -> None:
    modules = modules_of("common")
    assert "common.protocol.schema" in modules
    assert loaded_by(modules) == set()


def test_the_losses_load_torch_alone() -> None:
    assert loaded_by(["learner.trainer.losses"]) == {"torch"}


def test_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by(["deploy.cli.main"]) == set()
