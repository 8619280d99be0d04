"""Errors that a user sees as one line, and how other libraries' errors become one of them."""

from __future__ import annotations

import traceback
from pathlib import Path

import ray

from common.config.model import ConfigError
from common.data.rows import DataError
from common.error_text import one_line
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
"""Errors whose text is all that a user needs; other errors show a traceback."""
TRACEBACK = "error.txt"
_LOST_WITH_A_NODE = (ray.exceptions.ObjectLostError, ray.exceptions.NodeDiedError)
"""Answers over 100 KB lie in the object store of the node that made them and are lost with it."""


def known_error(error: Exception, folder: Path) -> Exception:
    """The error itself if it is known, else a RunError of one line; the traceback goes to ``error.txt`` in `folder`."""
    if isinstance(error, KNOWN_ERRORS):
        return error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRACEBACK
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    kind = "" if isinstance(error, ray.exceptions.RayTaskError) else f"{type(error).__name__}: "  # its text has it
    return RunError(f"{kind}{short(error)} (unexpected; the traceback is in {path})")


def outcome_of(error: Exception) -> str:
    """A failed run's outcome in ``summary.json``: one line of plain text."""
    return f"failed: {type(error).__name__}: {one_line(str(error).partition(chr(10))[0])}"


def unwrap_ray_error(error: Exception) -> Exception:
    """The actor's own error without Ray's wrapping, or a ServiceLost that names the lost actor or node."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    if isinstance(cause, KNOWN_ERRORS):
        return cause
    if isinstance(cause, ACTOR_LOST):
        node = ray._private.worker.global_worker.node
        logs = f"; its log is under {node.get_logs_dir_path()}" if node else ""
        return ServiceLost(f"an actor of the run died: {short(cause)}{logs}")
    if isinstance(cause, _LOST_WITH_A_NODE):
        return ServiceLost(f"a node is gone, and answers of this step with it: {short(cause)}")
    return error
