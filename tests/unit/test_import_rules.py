"""Who may import whom: services meet only in ``common``, and ``common`` is light enough for any process."""

from __future__ import annotations

import pytest

from tests.support.imports import (
    ENGINES,
    HEAVY,
    PACKAGES,
    SERVICES,
    Import,
    all_imports,
    imports_of,
    loaded_by,
)
from tests.support.paths import ROOT

WIRING = (
    "learner/cluster/services.py",
    "learner/cluster/teachers.py",
    "learner/data/games.py",
    "learner/experience/extract.py",
    "learner/experience/prompts.py",
)
"""The files that know the other services, and what of them it may know."""
WIRED = (
    "rollout_workers.actor",
    "rollout_workers.pool.failures",
    "rollout_workers.environments.playing",
    "rollout_workers.pool.pool",
    "rollout_workers.environments.registry",
    "rollout_workers.environments.episodes",
    "teacher_server.actor",
    "teacher_server.client",
)
ENTRY_POINTS = (
    "learner.train",
    "learner.experience.commands",
    "learner.data.inputs",
    "learner.cluster.placement",
    "teacher_server.http.serve",
    "teacher_server.http.auth",
)
"""What ``deploy`` starts, the reading of a run's data and the sum of its GPUs that a dry run and a submission repeat,
and the making of keys."""
SIMULATION = "deploy/simulator/simulate.py"
RULES_OF_THE_LOOP = ("learner.loop.micro_batcher", "learner.loop.staleness", "rollout_workers.pool.dispatch")
"""Pure classes by which the loop decides, and the simulator with it."""


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
        ("common/x.py", "from learner.trainer.losses import Form"),
        ("learner/x.py", "import teacher_server.client"),
        ("learner/x.py", "def f():\n    from rollout_workers import actor"),
        ("learner/x.py", "from ..teacher_server import client"),
        ("learner/cluster/services.py", "from rollout_workers.engine.engine import RolloutEngine"),
        ("rollout_workers/environments/x.py", "from learner.trainer.losses import Form"),
        ("teacher_server/x.py", "from deploy.tasks.gguf import prepare_smollm2"),
        ("deploy/x.py", "from learner.engine import LearnerEngine"),
        ("deploy/x.py", "from learner.loop.staleness import StalenessTracker"),
        ("deploy/simulator/simulate.py", "from learner.loop.training_loop import RolloutPipeline"),
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
        ("learner/cluster/services.py", "from teacher_server.client import TeacherClient"),
        ("learner/x.py", "import learner.trainer.losses, common.protocol.schema, torch"),
        ("rollout_workers/environments/x.py", "from ..stops import Stops"),
        ("deploy/x.py", "from learner import train"),
        ("deploy/simulator/simulate.py", "from learner.loop.staleness import StalenessTracker"),
    ],
)
def test_an_allowed_import_passes(file: str, source: str) -> None:
    assert [found for found in imports_of(source, file) if fault(found)] == []


def test_common_loads_nothing_heavy() -> None:
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in sorted((ROOT / "common").rglob("*.py"))
        if path.stem != "__init__"
    ]
    assert "common.protocol.schema" in modules
    assert loaded_by(modules) == set()


def test_the_losses_load_torch_alone() -> None:
    assert loaded_by(["learner.trainer.losses"]) == {"torch"}


def test_the_command_line_loads_nothing_heavy() -> None:
    assert loaded_by(["deploy.cli.main"]) == set()
