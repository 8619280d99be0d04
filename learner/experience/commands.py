"""`opcd experience`: the stages over rollout workers, and rounds of all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from common.async_utils import run_in_background
from common.config.model import Config, ConfigError
from common.telemetry.run_files import Progress, RunFiles
from learner import train
from learner.cluster.services import Services
from learner.experience.extract import extraction_of, folder, solver, without_context
from learner.experience.pool import POOL, SELECTED, Selection, candidates, consolidation_of, write_pool, write_selected
from learner.loop.checkpoints import Checkpoints
from learner.train import KNOWN_ERRORS

__all__ = ["KNOWN_ERRORS", "accumulate", "consolidate", "extract", "rounds", "select"]


def extract(config: Config) -> int:
    """Solve problems and write down insights; returns the exit status. Raises one of `KNOWN_ERRORS`."""
    progress = Progress()
    progress.status("reading data")
    extraction = extraction_of(config)
    try:
        status = 0
        if not extraction.done:
            status = _over_workers(
                without_context(config),
                solver(config),
                progress,
                lambda services: extraction.run(services, progress),
            )
        if status == 0:
            progress.line(extraction.summary())
        return status
    finally:
        extraction.close()


def accumulate(config: Config) -> int:
    """Nested contexts from what was extracted; returns the exit status. Raises one of `KNOWN_ERRORS`."""
    count = write_pool(config)
    Progress().line(f"{count} contexts in {folder(config) / POOL}")
    return 0


def select(config: Config) -> int:
    """Choose contexts of the pool; returns the exit status. Raises one of `KNOWN_ERRORS`."""
    progress, path = Progress(), folder(config)
    if config.experience.select == "random":
        chosen = candidates(config)
        write_selected(config, chosen)
        progress.line(f"{len(chosen)} contexts in {path / SELECTED}")
        return 0
    selection = Selection(config)
    try:
        status = 0
        if not selection.done:
            with RunFiles(path / "select", resume_after=0) as files:
                status = _over_workers(
                    without_context(config),
                    config.teacher_model,
                    progress,
                    lambda services: selection.run(services, files, progress),
                )
        if status == 0:
            kept = selection.keep()
            progress.line(f"kept {', '.join(kept[:5])}{' ...' if len(kept) > 5 else ''}")
        return status
    finally:
        selection.close()


def consolidate(config: Config, *, resume: bool = False) -> int:
    """Distil the selected contexts: a run; returns the exit status. Raises one of `KNOWN_ERRORS`."""
    return train.run(consolidation_of(config), resume=resume)


def rounds(config: Config, count: int) -> int:
    """All stages `count` times, each round's student the next one's solver and start; what is finished is left alone.

    Returns the exit status. Raises one of `KNOWN_ERRORS`.
    """
    lora = config.learner.lora
    if lora is not None and lora.publish == "adapter":
        raise ConfigError("rounds begin from the round before: learner.lora.publish must be `merged`")
    student = config.student.model
    for number in range(1, count + 1):
        one = round_of(config, number, student)
        if not _finished(one):
            Progress().line(f"round {number} of {count}, from {student}")
            resume = Checkpoints(one.run.path / "checkpoints", one.checkpoint.keep).newest() is not None
            for stage in () if resume else (extract, accumulate, select):
                if status := stage(one):
                    return status
            if status := consolidate(one, resume=resume):
                return status
        student = str(one.run.path / "checkpoint")
    return 0


def round_of(config: Config, number: int, student: str) -> Config:
    """Round `number` (from 1) as a run of its own, ``runs/NAME/round-NUMBER/``, that begins from `student`."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": config.run.path, "name": f"round-{number}"}),
            "student": config.student.model_copy(update={"model": student}),
            "experience": config.experience.model_copy(update={"model": None}),
        }
    )


def _finished(config: Config) -> bool:
    path = config.run.path / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["outcome"] == "finished"


def _over_workers(config: Config, model: str, progress: Progress, work: Callable[[Services], Awaitable[None]]) -> int:
    """`work` over rollout workers that are loaded with `model`; returns the exit status."""

    async def run() -> None:
        services = Services(config)
        try:
            progress.status(f"starting {model}")
            services.reserve(workers_only=True)
            await services.start_workers(model, None, config.rollout.workers)
            async with run_in_background(services.admit_replacements()):
                await work(services)
        finally:
            services.close()

    with train.interruptible(), train.cluster():
        try:
            asyncio.run(run())
        except KeyboardInterrupt:
            return train.INTERRUPTED
    return 0
