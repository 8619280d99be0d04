"""Errors of a run that explain themselves, and what to show of the others."""

from __future__ import annotations

import ray

from common.collective import SyncError
from common.config import ConfigError
from common.data import DataError
from common.scoring import TeacherError
from learner.checkpoints import CheckpointError
from learner.drift import DriftError
from learner.errors import RunError, ServiceLost
from learner.parity import ParityError
from learner.placement import PlacementError
from learner.services import PoolError

KNOWN_ERRORS = (
    ConfigError,
    DataError,
    RunError,
    ParityError,
    DriftError,
    SyncError,
    TeacherError,
    CheckpointError,
    PoolError,
    PlacementError,
)
"""Errors whose text is all a user needs; anything else shows its trace."""


def plain_error(error: Exception) -> Exception:
    """The error a user should see: what an actor raised instead of Ray's wrapping of it, or which actor died."""
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, KNOWN_ERRORS):
        return error.cause
    if isinstance(error, ray.exceptions.RayActorError):
        node = ray._private.worker.global_worker.node
        logs = f"; its log is under {node.get_logs_dir_path()}" if node else ""
        return ServiceLost(f"an actor of the run died: {' '.join(str(error).split())}{logs}")
    return error
