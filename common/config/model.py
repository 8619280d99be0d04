"""The configuration of a run as typed models, and every section's class re-exported; import them from here.

`common.config.loader` reads a file into these models. `common.config.rules` checks sections against one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from common.config.base import ConfigError, Section
from common.config.gpus import sync_backend
from common.config.inputs import (
    ContextConfig,
    DataConfig,
    EvalConfig,
    ExperienceConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)
from common.config.rules import (
    context_rules,
    data_rules,
    evaluation_rules,
    gpu_rules,
    importance_rules,
    learner_rules,
    loss_rules,
    reward_rules,
    schedule_rules,
    source_rules,
    sync_rules,
    teacher_rules,
    worker_rules,
)
from common.config.training import (
    CheckpointConfig,
    EnvironmentConfig,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    MixedLoss,
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
    "MixedLoss",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "StudentConfig",
    "SyncConfig",
    "TeacherConfig",
    "TeacherServerConfig",
]


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig
    student: StudentConfig
    teacher: TeacherConfig = TeacherConfig()
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], TeacherConfig] = {}
    """Further teachers by name, each with the keys of `teacher`. A row's column ``teacher`` names the one that scores
    it."""
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
        """`sync` with its defaults filled in: the transport, and ``weights/`` in the run's folder."""
        folder = (self.sync.folder or self.run.path / "weights").absolute()
        backend = sync_backend(self.sync, self.learner, self.rollout, self.named_teachers().values())
        return self.sync.model_copy(update={"folder": folder, "backend": backend})

    @property
    def answers_path(self) -> Path:
        """File of the teacher's own answers (`rollout.source: teacher`, `rollout.mix`)."""
        return self.rollout.answers_file or self.run.path / "offpolicy.jsonl"

    @property
    def teacher_model(self) -> str:
        """Folder or hub name of the teacher. Default: the student's initial model."""
        return self.teacher.model or self.student.model

    @property
    def answering_model(self) -> str | None:
        """The teacher's model, which an engine of the run can load to answer with the context; None if there is none.

        A teacher at a `url` may have none here, and the weights of backend `remote` are the endpoint's.
        """
        teacher = self.teacher
        if teacher.backend == "remote" and teacher.model != self.student.model:
            return None
        return teacher.model or (None if teacher.url else self.student.model)

    def mixed_losses(self) -> dict[str, MixedLoss]:
        """Return the losses of the sets of `data.mix`, by name."""
        return {name: one.loss for name, one in self.data.mix.items()}

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Return all teachers by name; the `teacher` section is ``default``."""
        return {"default": self.teacher, **self.teachers}

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        message = next(self._broken_rules(), None)
        if message is not None:
            raise ValueError(message)
        return self

    def _broken_rules(self) -> Iterator[str]:
        if "default" in self.teachers:
            yield "teachers: `default` is the name of the `teacher` section"
        yield from context_rules(self.context, self.data, self.rollout)
        yield from loss_rules(self.loss, self.rollout)
        yield from source_rules(
            self.rollout,
            self.loss,
            self.teacher,
            more_teachers=bool(self.teachers),
            answering_model=self.answering_model,
        )
        yield from data_rules(self.data, self.named_teachers(), self.loss)
        yield from importance_rules(self.loss, self.rollout)
        yield from reward_rules(self.loss, self.rollout)
        yield from learner_rules(self.learner, self.sync)
        yield from schedule_rules(self.learner)
        yield from sync_rules(self.sync, self.learner, self.rollout, self.named_teachers())
        yield from evaluation_rules(self.eval, self.data)
        yield from teacher_rules(self.named_teachers(), self.student, self.loss, self.learner)
        yield from worker_rules(self.rollout)
        yield from gpu_rules(self.learner, self.rollout, self.named_teachers())


class TeacherServerConfig(Section):
    """Configuration of ``opcd teacher``: the `teacher` section of a run's file, with its model filled in."""

    teacher: TeacherConfig
