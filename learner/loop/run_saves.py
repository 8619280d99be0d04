"""What a run writes of its weights, and when: exports, ``best/``, checkpoints to resume from, and on every way out."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import ray

from common.config.model import CheckpointConfig, Config
from common.telemetry.run_files import Progress, write_json
from learner.cluster.services import Services
from learner.errors import RunError, SaveError, ServiceLost
from learner.evaluation.summary import Best, RunSummary
from learner.loop.checkpoints import Checkpoints, Manifest
from learner.loop.remote_copy import RemoteCopy

BEST = "best.json"
"""File in ``best/`` with the step and the accuracy of its weights."""
CHECKPOINT_INTERVAL_S = 180.0
"""Time between checkpoints with the default of ``checkpoint.every``, unless that would take too much of the run."""
MAX_CHECKPOINT_SHARE = 0.02
"""Part of the run's time that such checkpoints may take."""
LAST_CHECKPOINT_TIMEOUT_S = 600.0
"""Limit for the checkpoint of a run that has failed: a rank may hang."""


def checkpoint_interval_s(last_write_s: float) -> float:
    """Seconds between the end of a checkpoint, which took `last_write_s`, and the next one by time."""
    return max(CHECKPOINT_INTERVAL_S, last_write_s * (1 / MAX_CHECKPOINT_SHARE - 1))


class CheckpointSchedule:
    """Decides after which steps a checkpoint is due."""

    def __init__(self, settings: CheckpointConfig, steps: int, now: Callable[[], float] = time.monotonic) -> None:
        """`steps` is the run's last step."""
        self._every = settings.every
        self._last_step = steps
        self._now = now
        self._wrote(0.0)

    def begin(self) -> None:
        """Count the time from here: the first step begins."""
        self._wrote(0.0)

    def is_due(self, step: int) -> bool:
        """True if a checkpoint must be written after `step`."""
        if self._every is None:
            return step < self._last_step and self._now() >= self._next
        return self._every > 0 and (step % self._every == 0 or step == self._last_step)

    def wrote(self, seconds: float) -> None:
        """Count a checkpoint that has just been written in `seconds`."""
        self._wrote(seconds)

    def _wrote(self, seconds: float) -> None:
        self._next = self._now() + checkpoint_interval_s(seconds)


class RunSaves:
    """Writes the weights of one run. `manifest` describes the last whole step for a checkpoint.

    A save during the run that fails costs a warning. The last one raises SaveError, after the weights have been written
    in another form: nothing that was trained is lost while any disk takes it.
    """

    def __init__(
        self,
        config: Config,
        services: Services,
        progress: Progress,
        summary: RunSummary,
        manifest: Callable[[], Manifest],
    ) -> None:
        self._config = config
        self._services = services
        self._progress = progress
        self._summary = summary
        self._manifest = manifest
        self._folder = config.run.path.absolute()
        self._checkpoints = Checkpoints(config.run.path / "checkpoints", config.checkpoint.keep)
        copy_to = config.checkpoint.copy_to
        self._copy = None if copy_to is None else RemoteCopy(copy_to, config.run.name)
        self.schedule = CheckpointSchedule(config.checkpoint, config.learner.steps)
        newest = self._checkpoints.newest()
        self._resumable = newest[1].step if newest else 0

    # --- during the run ---------------------------------------------------------------------------------------------

    async def after_step(self, step: int) -> None:
        """Write the export and the checkpoint that are due after `step`."""
        settings = self._config.checkpoint
        if step in settings.export_at or (settings.export_every and step % settings.export_every == 0):
            await self._try_export(self._folder / "exports" / f"step-{step:06d}")
        if self.schedule.is_due(step):
            self._progress.status(f"step {step}: checkpoint")
            await self._checkpoint()

    async def best(self, step: int, accuracy: float) -> None:
        """Write ``best/``."""
        folder = self._folder / "best"
        if await self._try_export(folder):
            self._summary.best = Best(step=step, accuracy=accuracy)
            write_json(folder / BEST, asdict(self._summary.best))

    def forget_other_best(self) -> None:
        """Choose ``best/`` anew if it holds later weights, written between the checkpoint and a crash."""
        path, best = self._config.run.path / "best" / BEST, self._summary.best
        if best is not None and (not path.exists() or json.loads(path.read_text()) != asdict(best)):
            self._progress.line(f"WARNING: best/ no longer holds the weights of step {best.step}; it is chosen anew")
            self._summary.best = None

    async def _try_export(self, folder: Path) -> bool:
        try:
            await self._services.save(str(folder))
        except SaveError as error:
            self._progress.line(f"WARNING: {error}; the run goes on without it")
            return False
        await self._copy_folder(folder)
        return True

    async def _copy_folder(self, folder: Path) -> None:
        """Copy an export or a checkpoint to ``checkpoint.copy_to``. A failure costs a warning: the folder is there."""
        if self._copy is None:
            return
        started, name = time.time(), folder.relative_to(self._folder).as_posix()
        self._progress.status(f"copying {name}")
        try:
            await asyncio.to_thread(self._copy.put, folder, name)
            if folder.parent == self._checkpoints.folder.absolute():
                kept = {path.name for path in folder.parent.glob("step-*[0-9]")}
                await asyncio.to_thread(self._copy.keep, "checkpoints", kept)
        except OSError as error:
            self._progress.line(f"WARNING: {error}; the run goes on without it")
        self._summary.add_seconds({"copies": time.time() - started})

    async def _checkpoint(self, *, drop_step: bool = False) -> bool:
        """Write a checkpoint of the last whole step. A failure costs a warning; the earlier checkpoints are there."""
        started, manifest = time.time(), self._manifest()
        error = await self._checkpoints.write(manifest, self._services, drop_step=drop_step)
        seconds = time.time() - started
        self._summary.add_seconds({"checkpoint": seconds})
        self.schedule.wrote(seconds)
        if error is not None:
            self._summary.failed_checkpoints += 1
            self._progress.line(f"WARNING: {error}; the run goes on without it")
            return False
        self._resumable = manifest.step
        await self._copy_folder(self._checkpoints.path(manifest.step).absolute())
        return True

    # --- ways out ---------------------------------------------------------------------------------------------------

    async def at_end(self) -> None:
        """Write ``checkpoint/``. If that fails, write a checkpoint or a folder elsewhere, then raise SaveError."""
        try:
            await self._services.save(str(self._folder / "checkpoint"))
            await self._copy_folder(self._folder / "checkpoint")
        except SaveError as error:
            raise SaveError(f"{error}; {await self._save_otherwise(self._summary.steps)}") from error

    async def _save_otherwise(self, steps: int) -> str:
        """Keep the weights of the last step in another form; returns where they are."""
        if self._resumable == steps or await self._checkpoint():
            return f"the weights of step {steps} are in the checkpoint: {self.how_to_resume()}"
        elsewhere = Path(tempfile.mkdtemp(prefix=f"opcd-{self._config.run.name}-")) / "checkpoint"
        await self._services.save(str(elsewhere))
        return f"the weights of step {steps} are in {elsewhere}: move them"

    async def interrupted(self) -> None:
        """Write a checkpoint and ``checkpoint/`` of the last whole step; a second interrupt leaves without them."""
        steps = self._summary.steps
        self._progress.line(f"saving the weights of step {steps}; interrupt again to leave without")
        if self._config.checkpoint.every != 0 and self._resumable != steps:
            await self._checkpoint(drop_step=True)
        if await self._try_export(self._folder / "checkpoint"):
            self._progress.line(f"step {steps} is in {self._config.run.path / 'checkpoint'}")
        if self._resumable == steps:
            self._progress.line(self.how_to_resume())

    async def failed(self, error: BaseException) -> None:
        """Write a checkpoint of the last whole step, if the learner still holds it. Raises nothing of its own."""
        steps = self._summary.steps
        if isinstance(error, ServiceLost | SaveError) or self._config.checkpoint.every == 0:
            return
        try:
            async with asyncio.timeout(LAST_CHECKPOINT_TIMEOUT_S):
                if self._resumable != steps and await self._services.weight_version() == steps:
                    self._progress.status(f"step {steps}: checkpoint")
                    await self._checkpoint(drop_step=True)
        except (RunError, TimeoutError, ray.exceptions.RayError) as other:
            self._progress.line(f"WARNING: no checkpoint of step {steps}: {' '.join(str(other).split())}")
        if self._resumable:
            self._progress.line(self.how_to_resume())

    def how_to_resume(self) -> str:
        """The command that goes on from the newest checkpoint."""
        return f"to go on from step {self._resumable}: opcd train {self._config.run.path / 'config.yaml'} --resume"
