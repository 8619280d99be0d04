"""The commands of `opcd experience`: extract, accumulate, select, consolidate, and rounds of all four.

Each returns the exit status and raises one of `KNOWN_ERRORS`. A stage that was cut off continues from its file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

from common.async_utils import run_in_background
from common.config.model import Config, ConfigError, RunConfig
from common.telemetry.run_files import Progress, RunFiles
from learner import train
from learner.cluster.services import Services
from learner.experience.accumulate import write_pool
from learner.experience.extract import prepare_extraction, solver, without_context
from learner.experience.select import Selection, candidates, context_of_pool, write_selected
from learner.experience.stage_files import POOL, SELECTED, experience_folder
from learner.loop.checkpoints import Checkpoints
from learner.loop.user_errors import known_error, unwrap_ray_error
from learner.train import KNOWN_ERRORS

__all__ = ["KNOWN_ERRORS", "accumulate", "consolidate", "consolidation_config", "extract", "rounds", "select"]


def extract(config: Config) -> int:
    """Solve problems and write insights: ``solved.jsonl``, ``extracted.jsonl``."""
    progress = Progress()
    progress.status("reading data")
    extraction = prepare_extraction(config)
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
    """Build nested contexts from the insights: ``pool.jsonl``."""
    count = write_pool(config)
    Progress().line(f"{count} contexts in {experience_folder(config.run) / POOL}")
    return 0


def select(config: Config) -> int:
    """Choose contexts of the pool: ``selected.jsonl``."""
    progress, folder = Progress(), experience_folder(config.run)
    if config.experience.select == "random":
        chosen = candidates(config.run, config.experience)
        write_selected(config.run, chosen)
        progress.line(f"{len(chosen)} contexts in {folder / SELECTED}")
        return 0
    selection = Selection(config)
    try:
        status = 0
        if not selection.done:
            with RunFiles(folder / "select", resume_after=0) as files:
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


def consolidate(config: Config, *, resume: bool = False, overwrite: bool = False) -> int:
    """Distil the selected contexts: an ordinary run."""
    return train.run(consolidation_config(config), resume=resume, overwrite=overwrite)


def consolidation_config(config: Config) -> Config:
    """Return the configuration of the run that distils the selection. Raises ConfigError if there is none."""
    selected = experience_folder(config.run) / SELECTED
    if not selected.exists():
        raise ConfigError(f"{selected} is missing: run `opcd experience select` first")
    return config.model_copy(update={"context": context_of_pool(config.context, selected)})


def rounds(config: Config, count: int) -> int:
    """Run all stages `count` times: each round's student is the next round's solver and initial student.

    Finished rounds are skipped; a round with a checkpoint is resumed; any other round starts anew.
    """
    lora = config.learner.lora
    if lora is not None and lora.publish == "adapter":
        raise ConfigError("each round starts from the weights of the last one: learner.lora.publish must be `merged`")
    student = config.student.model
    for number in range(1, count + 1):
        one = _round_config(config, number, student)
        if not _finished(one.run):
            Progress().line(f"round {number} of {count}, from {student}")
            resume = Checkpoints(one.run.path / "checkpoints", one.checkpoint.keep).newest() is not None
            for stage in () if resume else (extract, accumulate, select):
                if status := stage(one):
                    return status
            if status := consolidate(one, resume=resume, overwrite=not resume):
                return status
        student = str(one.run.path / "checkpoint")
    return 0


def _round_config(config: Config, number: int, student: str) -> Config:
    """Return the configuration of round `number` (from 1): a run in ``runs/NAME/round-NUMBER/`` from `student`."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": config.run.path, "name": f"round-{number}"}),
            "student": config.student.model_copy(update={"model": student}),
            "experience": config.experience.model_copy(update={"model": None}),
        }
    )


def _finished(run: RunConfig) -> bool:
    path = run.path / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["outcome"] == "finished"


def _over_workers(config: Config, model: str, progress: Progress, work: Callable[[Services], Awaitable[None]]) -> int:
    """Do `work` with rollout workers that run `model`; return the exit status."""

    async def run() -> None:
        services = Services(config)
        try:
            progress.status(f"starting {model}")
            if (warning := services.reserve(workers_only=True)) is not None:
                progress.line(f"WARNING: {warning}")
            await services.start_workers(model, None, config.rollout.workers)
            async with run_in_background(services.admit_replacements()):
                await work(services)
        finally:
            services.close()

    with train.cluster(), train.interruptible():
        try:
            asyncio.run(run())
        except KeyboardInterrupt:
            return train.INTERRUPTED
        except Exception as error:
            raise known_error(unwrap_ray_error(error), config.run.path) from error
    return 0
