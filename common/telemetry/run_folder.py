"""A run's folder: the lock that keeps a second run out, and what an earlier run left in it.

The lock is ``flock`` on `LOCK`. The kernel releases it when the run's process ends, however it ends. It holds between
machines on NFS (version 4, or 3 with a lock daemon), and on Lustre and BeeGFS if locks are turned on there. NFS mounted
with ``local_lock`` locks each machine alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.config.base import ConfigError

LOCK = "run.lock"
"""File of the lock. It stays in the folder and names the run that holds it, or held it last."""
RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "samples.jsonl",
    "audit.jsonl",
    "tokens.jsonl",
    "texts.jsonl",
    "trace.json",
    "summary.json",
    "accuracy.json",
    "report.html",
    "error.txt",
    "wandb.id",
    "mlflow.id",
    "tensorboard",
    "checkpoint",
    "checkpoints",
    "best",
    "exports",
    "skipped",
    "weights",
    "evaluate",
)
"""Everything that belongs to one run. The teacher's stored answers (``offpolicy.jsonl``) and the contexts of the
experience pipeline are inputs, which a later run may use again."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class EarlierRun:
    """The run that a folder holds: finished steps, and ``summary.json``'s outcome (`unfinished` without one)."""

    outcome: str
    steps: int
    checkpoint: bool
    """True if there is a checkpoint that ``--resume`` can start from."""

    @property
    def finished(self) -> bool:
        """True if the run reached its end."""
        return self.outcome == "finished"


def earlier_run(folder: Path) -> EarlierRun | None:
    """The run in `folder`, from its files; None if the folder holds none."""
    if not any((folder / name).exists() for name in RUN_FILES):
        return None
    return EarlierRun(
        outcome=_outcome(folder / "summary.json"),
        steps=_last_step(folder / "metrics.jsonl"),
        checkpoint=any(folder.glob("checkpoints/step-*[0-9]/manifest.json")),
    )


def _outcome(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["outcome"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished"


def _last_step(path: Path) -> int:
    """The last training step in ``metrics.jsonl``; evaluations before the first step do not count."""
    steps = 0
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                steps = max(steps, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):  # a last line that a crash cut
                continue
    except OSError:
        return 0
    return steps


def check_start(folder: Path, *, resume: bool, overwrite: bool) -> str | None:
    """Raise ConfigError if a run must not start in `folder`, because it would replace another run or files that no run
    wrote. Returns a line about an earlier run without a finished step, which the new one replaces.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues the run in the folder, --overwrite replaces it: give one of them")
    found = earlier_run(folder)
    if found is None or resume or overwrite:
        return None
    instead = f"choose another name (run.name={next_free_name(folder)}) or replace it with --overwrite"
    if not (folder / LOCK).exists():
        names = ", ".join(name for name in RUN_FILES if (folder / name).exists())
        raise ConfigError(f"{folder} holds files that this version of opcd did not write ({names}): {instead}")
    if found.finished:
        raise ConfigError(f"{folder} holds a finished run of {found.steps} steps: {instead}")
    if found.checkpoint:
        raise ConfigError(
            f"{folder} holds a run with a checkpoint, {_ended(found)}: --resume continues it; otherwise {instead}"
        )
    if found.steps:
        raise ConfigError(f"{folder} holds a run without a checkpoint, {_ended(found)}: {instead}")
    return f"replacing the earlier run in {folder}, which ended before its first step ({found.outcome})"


def nothing_to_resume(folder: Path, steps: int) -> str | None:
    """A line that says so if the run in `folder` has finished all `steps`; None if there are steps left."""
    found = earlier_run(folder)
    if found is None or not found.finished or found.steps < steps:
        return None
    return (
        f"{folder} is finished, {found.steps} of {steps} steps: nothing to resume; its weights are in "
        f"{folder / 'checkpoint'}, and a larger learner.steps continues it"
    )


def _ended(found: EarlierRun) -> str:
    return f"{found.outcome} after {found.steps} steps"


def next_free_name(folder: Path) -> str:
    """A name like that of `folder`, with the next number that is free next to it: ``demo`` -> ``demo-2``."""
    match = re.fullmatch(r"(.+?)-(\d+)", folder.name)
    stem, number = (match[1], int(match[2])) if match else (folder.name, 1)
    while (folder.parent / f"{stem}-{(number := number + 1)}").exists():
        pass
    return f"{stem}-{number}"


def clear(folder: Path) -> None:
    """Remove the files of an earlier run; files of others stay. Call it with the lock held."""
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError if a run must not start in `folder`, or if another run holds it. Changes nothing."""
    if (folder / LOCK).exists():
        with (folder / LOCK).open("r+", encoding="utf-8") as stream:
            _lock(stream, folder)
    check_start(folder, resume=resume, overwrite=overwrite)


@contextmanager
def owned(folder: Path) -> Iterator[str | None]:
    """Hold the lock of `folder`, which is created. Yields a warning if its file system has no locks, else None.

    Raises ConfigError, at once, if another run holds it or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks need write access
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; run.dir sets another folder") from error
    with open(descriptor, "r+", encoding="utf-8") as stream:
        warning = _lock(stream, folder)
        stream.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}, stream)
        stream.flush()
        yield warning


def _lock(stream: IO[str], folder: Path) -> str | None:
    """Take the lock until `stream` closes. Returns a warning if the file system has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{folder} is in use by another run ({_holder(stream)}): wait for its end, stop it, or choose another name "
            f"(run.name={next_free_name(folder)})"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return f"{folder / LOCK} cannot be locked ({error.strerror}): make sure that no other run uses this folder"
    return None


def _holder(stream: IO[str]) -> str:
    try:
        held = json.load(stream)
        return f"process {held['pid']} on {held['host']}, since {held['since']}"
    except (ValueError, KeyError, TypeError):  # it is being written
        return "its lock is held"
