"""Errors of a run that explain themselves, and what to show of the others."""

from __future__ import annotations

import ray

from common.config.model import ConfigError
from common.data.rows import DataError
from common.protocol.scoring import TeacherError
from common.weight_sync.collective import SyncError
from learner.cluster.placement import PlacementError
from learner.cluster.services import ACTOR_LOST, PoolError, short
from learner.errors import RunError, ServiceLost
from learner.loop.checkpoints import CheckpointError
from learner.loop.mismatch import MismatchError
from learner.loop.parity import ParityError

KNOWN_ERRORS = (
    ConfigError,
    DataError,
    RunError,
    ParityError,
    MismatchError,
    SyncError,
    TeacherError,
    CheckpointError,
    PoolError,
    PlacementError,
)
"""Errors whose text is all a user needs; anything else shows its trace."""
_LOST_WITH_A_NODE = (ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError)
"""Answers of more than 100 KB lie in the object store of the node that made them. The first has a subclass for every
way to find that out."""


def plain_error(error: Exception) -> Exception:
    """The error a user should see: what an actor raised instead of Ray's wrapping of it, which actor died, or that a
    node took answers with it.
    """
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, KNOWN_ERRORS):
        return cause
    if isinstance(cause, ACTOR_LOST):
        node = ray._private.worker.global_worker.node
        logs = f"; its log is under {node.get_logs_dir_path()}" if node else ""
        return ServiceLost(f"an actor of the run died: {short(cause)}{logs}")
    if isinstance(cause, _LOST_WITH_A_NODE):
        return ServiceLost(f"a node is gone, and with it answers that were to be trained on: {short(cause)}")
    return error
