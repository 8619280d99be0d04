"""The configuration of a run as typed, closed models; `common.config.loader` reads them. Import all of it from here.

One section per process or concern, in `common.config.inputs` and `common.config.training`. Every model rejects unknown
keys; a mistake is one `ConfigError` line that names the key, the value and the nearest valid one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from common.config.base import ConfigError, Section
from common.config.inputs import (
    ContextConfig,
    DataConfig,
    EvalConfig,
    ExperienceConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from common.config.training import (
    CheckpointConfig,
    EnvironmentConfig,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    RolloutConfig,
    SyncConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "ContextConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "ExperienceConfig",
    "LearnerConfig",
    "LoraConfig",
    "LossConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "StudentConfig",
    "SyncConfig",
    "TeacherConfig",
    "TeacherServerConfig",
]


class Config(Section):
    """Everything one run is made of."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], TeacherConfig] = {}
    """More teachers by name, each with the keys of `teacher`: a row's ``teacher`` column says which one scores it."""
    context: ContextConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    experience: ExperienceConfig = ExperienceConfig()

    @property
    def sync_in_run(self) -> SyncConfig:
        """`sync` with its default folder filled in: ``weights/`` of the run."""
        folder = (self.sync.folder or self.run.path / "weights").absolute()
        return self.sync.model_copy(update={"folder": folder})

    @property
    def answers_path(self) -> Path:
        """Where the teacher's own answers are kept (`rollout.source: teacher`)."""
        return self.rollout.answers_file or self.run.path / "offpolicy.jsonl"

    @property
    def teacher_model(self) -> str:
        """Folder or hub name of the teacher: the student's own initial model unless another is named."""
        return self.teacher.model or self.student.model

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name; `teacher` is ``default``."""
        return {"default": self.teacher, **self.teachers}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        from common.config.rules import fault  # which reads this module

        found = fault(self)
        if found is not None:
            raise ValueError(found)
        return self


class TeacherServerConfig(Section):
    """What ``opcd teacher`` reads: the `teacher` section of the same file, its model named."""

    teacher: TeacherConfig
