"""Checkpoints that a run can resume from: folders of state, each made valid by a manifest that is written last.

::

    runs/NAME/checkpoints/
      step-000020/manifest.json     the loop's state and the run's identity
                  learner/          DeepSpeed's parts, one set per rank
      step-000040.partial/          in progress, or left over from a crash: ignored and removed

With several nodes, all of them must share the folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.config.model import Config, LearnerConfig, TeacherConfig
from common.files import apply_umask
from learner.cluster.services import Services

FORMAT = 1
MANIFEST = "manifest.json"
LEARNER = "learner"
_PARTIAL = ".partial"
_SAMPLING = {
    "source",
    "mix",
    "batch_size",
    "samples_per_prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "topk_from",
}


class CheckpointError(ValueError):
    """A checkpoint cannot be written or resumed; the text says which one, why, and the remedy."""


class Identity(BaseModel):
    """Everything that decides a run's result, so that a run does not resume another run's checkpoint by accident."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    tokenizer: str
    teachers: dict[str, str]
    """Teacher's name -> its model fingerprint."""
    teaching: dict[str, dict[str, Any]] = {}
    """Teacher's name -> kind, decay, refresh: a frozen, a live and an averaging teacher start with one fingerprint."""
    contexts: tuple[str, ...]
    """Hashes of the contexts; one joint hash for a pool."""
    pool: str | None = None
    """sha256 of the context pool."""
    data: str
    """sha256 of the training rows."""
    loss: dict[str, Any]
    rollout: dict[str, Any]
    """Batch size, samples per prompt, sampling, seed."""
    learner: dict[str, Any]
    """Ranks, ZeRO stage, adapters: the shape of the saved state; the schedule of a learning rate that falls."""

    def differences(self, other: Identity) -> Iterator[str]:
        """One line for each value in which `other`, the current run, differs from the checkpoint."""
        here = dict(_flat(other.model_dump(mode="json")))
        for name, value in _flat(self.model_dump(mode="json")):
            found = here.pop(name, None)
            if found != value:
                yield f"{name}: the checkpoint has {value}, this run has {found}"
        for name, value in here.items():
            yield f"{name}: the checkpoint has none, this run has {value}"


class Manifest(BaseModel):
    """Content of ``manifest.json``; a folder without one is no checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    step: int
    """Finished steps: weight version, data cursor, and (with the seed) the state of every sampler."""
    identity: Identity
    loop: dict[str, Any]
    """State of the loop: summary so far, position in the samples, ``trace_bytes`` of the timeline, and ``part``: the
    number of processes that the run has had so far."""
    files: dict[str, int] = {}
    """Every other file of the folder and its size in bytes: a truncated file must not be loaded."""


def identity_of(
    config: Config,
    *,
    tokenizer: str,
    teachers: dict[str, str],
    contexts: tuple[str, ...],
    data: str,
    pool: str | None = None,
) -> Identity:
    """The identity of a run that is about to start; `data` and `pool` are digests of training rows and context pool."""
    lora = config.learner.lora
    return Identity(
        student=config.student.model,
        tokenizer=tokenizer,
        teachers=teachers,
        teaching={name: _teaching(section) for name, section in config.named_teachers().items()},
        contexts=tuple(sorted(contexts)) if pool is None else (_joint(contexts),),
        pool=pool,
        data=data,
        loss={**config.loss.model_dump(mode="json"), **_mixed_losses(config)},
        rollout={"seed": config.run.seed, **config.rollout.model_dump(mode="json", include=_SAMPLING)},
        learner={
            "ranks": config.learner.ranks,
            "zero_stage": config.learner.zero_stage,
            "dtype": config.student.dtype,
            "lora": None if lora is None else lora.model_dump(mode="json"),
            **_schedule(config.learner),
        },
    )


def _mixed_losses(config: Config) -> dict[str, Any]:
    """The losses of sets that change something; other sets have `loss`."""
    found = {name: one.model_dump(mode="json", exclude_defaults=True) for name, one in config.mixed_losses().items()}
    changed = {name: one for name, one in found.items() if one}
    return {"mix": changed} if changed else {}


def _schedule(learner: LearnerConfig) -> dict[str, Any]:
    """The settings of a learning rate that falls; with other ones a resumed run would jump to another curve."""
    if learner.lr_schedule == "constant":
        return {}
    keys = {"lr_schedule", "lr", "min_lr", "warmup_steps", "decay_steps", "steps"}
    return learner.model_dump(mode="json", include=keys)


def _teaching(section: TeacherConfig) -> dict[str, Any]:
    refreshed = {} if section.refresh_every == 1 else {"refresh_every": section.refresh_every}
    return {"kind": section.kind, "ema_decay": section.ema_decay if section.kind == "ema" else None, **refreshed}


def _joint(names: tuple[str, ...]) -> str:
    """One hash for hundreds of contexts, so that a difference takes one line."""
    return hashlib.sha256("".join(sorted(names)).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run, under ``folder``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    async def write(self, manifest: Manifest, services: Services, *, drop_step: bool = False) -> CheckpointError | None:
        """Write a checkpoint. Returns the disk's error, which need not end a run: the last checkpoint is still there.

        `drop_step` as in `Services.save_state`.

        Raises ServiceLost if a rank of the learner died meanwhile, which can read like a disk error on the others.
        """
        try:
            with self.writing(manifest) as folder:
                await services.save_state(str(folder.absolute()), drop_step=drop_step)
        except CheckpointError as error:
            await services.check_ranks()
            return error
        return None

    @contextmanager
    def writing(self, manifest: Manifest) -> Iterator[Path]:
        """Yield a folder for the learner's state of `manifest.step`; the checkpoint becomes valid at the end.

        Checkpoints beyond `keep` are removed only after the new one is whole. Raises CheckpointError if the disk does
        not take it; the earlier checkpoints then remain.
        """
        final = self.path(manifest.step)
        partial = final.with_name(final.name + _PARTIAL)
        try:
            with _disk_errors(final):
                self._clear_partial()
                (partial / LEARNER).mkdir(parents=True)
                yield partial / LEARNER
                apply_umask(partial)
                whole = manifest.model_copy(update={"files": _synced_files(partial)})
                (partial / MANIFEST).write_text(whole.model_dump_json(indent=2) + "\n", encoding="utf-8")
                _sync(partial / MANIFEST)
                if final.exists():  # written before by a run that resumed from an earlier checkpoint
                    shutil.rmtree(final)
                os.replace(partial, final)
                _sync(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self._whole()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest whole checkpoint, or None. Raises CheckpointError for a damaged one."""
        found = self._whole()
        if not found:
            return None
        path = found[-1]
        try:
            manifest = Manifest.model_validate_json((path / MANIFEST).read_text(encoding="utf-8"))
            for name, size in manifest.files.items():
                if (path / name).stat().st_size != size:
                    raise OSError(f"{name} has {(path / name).stat().st_size} bytes, it was written with {size}")
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged ({' '.join(str(error).split())}); remove the folder to go on from the "
                "checkpoint before it"
            ) from error
        return path, manifest

    def _whole(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*[0-9]/{MANIFEST}"))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / f"step-{step:06d}"

    def _clear_partial(self) -> None:
        for left in self.folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(left)


def refuse_other_run(manifest: Manifest, path: Path, here: Identity) -> None:
    """Raise CheckpointError, with every difference, if `manifest` belongs to another run."""
    different = list(manifest.identity.differences(here))
    if different:
        raise CheckpointError(
            f"{path} belongs to another run:\n  "
            + "\n  ".join(different)
            + "\n--accept-changes resumes anyway (the result is then that of neither run)"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        free = shutil.disk_usage(_existing(path)).free / 1e9
        raise CheckpointError(
            f"checkpoint {path} was not written: {' '.join(str(error).split())}; {free:.1f} GB are free there"
        ) from error


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _synced_files(folder: Path) -> dict[str, int]:
    """Size of every file under `folder`, each flushed to the disk first."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
