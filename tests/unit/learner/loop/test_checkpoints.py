"""Checkpoints of a run as files: whole or absent, newest first, refused where they are another run's."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from learner.loop.checkpoints import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    Identity,
    Manifest,
    identity_of,
    refuse_other_run,
)
from tests.support.scored import learner_config

IDENTITY = Identity(
    student="a",
    tokenizer="t",
    teachers={"default": "f"},
    contexts=("c",),
    data="d",
    loss={"top_k": 256},
    rollout={"seed": 0},
    learner={"ranks": 1, "lora": None},
)


def manifest(step: int) -> Manifest:
    return Manifest(step=step, identity=IDENTITY, loop={"kl": [1.5, 0.25]})


def save(kept: Checkpoints, step: int, text: str) -> Path:
    with kept.writing(manifest(step)) as folder:
        (folder / "rank0.pt").write_text(text)
    return folder.parent.with_name(f"step-{step:06d}")


def test_what_was_saved_comes_back_and_only_the_newest_stay(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert kept.newest() is None
    for step in (2, 4, 10):
        save(kept, step, f"state {step}")
    found = kept.newest()
    assert found is not None
    path, newest = found
    assert (path / "learner/rank0.pt").read_text() == "state 10"
    assert (newest.step, newest.loop) == (10, {"kl": [1.5, 0.25]})
    assert sorted(p.name for p in kept.folder.iterdir()) == ["step-000004", "step-000010"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=1)
    save(kept, 1, "good")

    def fill_the_disk() -> None:
        with kept.writing(manifest(2)) as folder:
            (folder / "rank0.pt").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-000002 was not written.*GB are free"):
        fill_the_disk()
    found = kept.newest()
    assert found is not None
    assert found[1].step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_crash_while_writing_leaves_nothing_that_counts(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    save(kept, 1, "good")
    (tmp_path / "step-000002.partial" / "learner").mkdir(parents=True)
    (tmp_path / "step-000003").mkdir()  # no manifest: not one of ours
    found = kept.newest()
    assert found is not None
    assert found[1].step == 1
    save(kept, 4, "later")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_named_not_loaded(tmp_path: Path, damage: str) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    path = save(kept, 7, "whole state")
    state = path / "learner/rank0.pt"
    if damage == "cut":
        state.write_text("whole st")
    elif damage == "gone":
        state.unlink()
    else:
        (path / MANIFEST).write_text('{"format": 1}')
    with pytest.raises(CheckpointError, match=r"step-000007 is damaged.*remove the folder"):
        kept.newest()


def test_another_run_is_refused_with_every_difference_named() -> None:
    here = IDENTITY.model_copy(update={"loss": {"top_k": 64}, "teachers": {"default": "g"}, "contexts": ("c", "d")})
    with pytest.raises(CheckpointError) as caught:
        refuse_other_run(manifest(3), Path("runs/x"), here)
    text = str(caught.value)
    assert "loss.top_k: the checkpoint has 256, this run has 64" in text
    assert "teachers.default: the checkpoint has f, this run has g" in text
    assert "contexts: " in text
    assert "--accept-changes" in text
    refuse_other_run(manifest(3), Path("runs/x"), IDENTITY)


EMA = {"kind": "ema", "ema_decay": 0.99}
PARTS: dict[str, Any] = {"tokenizer": "t", "teachers": {"default": "f"}, "contexts": ("c",), "data": "d"}


def identity(parts: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Identity:
    return identity_of(learner_config(Path("student"), **sections), **{**PARTS, **(parts or {})})


@pytest.mark.parametrize(
    ("before", "here", "said"),
    [
        (identity(), identity(teacher={"kind": "live"}), "kind: the checkpoint has frozen, this run has live"),
        (identity(), identity(teacher=EMA), "ema_decay: the checkpoint has None, this run has 0.99"),
        (
            identity(teacher=EMA),
            identity(teacher={**EMA, "ema_decay": 0.9}),
            "teaching.default.ema_decay: the checkpoint has 0.99, this run has 0.9",
        ),
        (
            identity(teacher={"kind": "live", "refresh_every": 30}),
            identity(teacher={"kind": "live"}),
            "teaching.default.refresh_every: the checkpoint has 30, this run has None",
        ),
        (
            identity(teachers={"big": {"kind": "frozen"}}),
            identity(teachers={"big": {"kind": "live"}}),
            "teaching.big.kind: the checkpoint has frozen, this run has live",
        ),
        (identity(), identity({"tokenizer": "u"}), "tokenizer: the checkpoint has t, this run has u"),
        (identity(), identity({"teachers": {"default": "g"}}), "teachers.default: the checkpoint has f"),
        (identity(), identity({"contexts": ("e",)}), "contexts: the checkpoint has ['c'], this run has ['e']"),
        (identity(), identity({"data": "e"}), "data: the checkpoint has d, this run has e"),
        (identity(), identity(loss={"top_k": 7}), "loss.top_k: the checkpoint has 256, this run has 7"),
        (identity(), identity(rollout={"temperature": 0.5}), "rollout.temperature: the checkpoint has 1.0"),
        (identity(), identity(learner={"ranks": 2}), "learner.ranks: the checkpoint has 1, this run has 2"),
        (
            identity(learner={"lr_schedule": "cosine", "steps": 9}),
            identity(learner={"lr_schedule": "cosine", "steps": 19}),
            "learner.steps: the checkpoint has 9, this run has 19",
        ),
        (identity(learner={"lr_schedule": "linear"}), identity(), "lr_schedule: the checkpoint has linear, this run"),
    ],
)
def test_what_decides_the_result_is_in_the_identity(
    tmp_path: Path, before: Identity, here: Identity, said: str
) -> None:
    """As it comes back from the disk."""
    kept = Checkpoints(tmp_path, keep=1)
    with kept.writing(Manifest(step=1, identity=before, loop={})):
        pass
    found = kept.newest()
    assert found is not None
    path, written = found
    refuse_other_run(written, path, before)
    with pytest.raises(CheckpointError) as caught:
        refuse_other_run(written, path, here)
    assert said in str(caught.value)


def test_what_does_not_decide_the_result_may_change() -> None:
    before = Manifest(step=1, identity=identity(), loop={})
    refuse_other_run(before, Path("runs/x"), identity(teacher={"ema_decay": 0.5, "batch_tokens": 7}))
    refuse_other_run(before, Path("runs/x"), identity(learner={"steps": 99, "micro_batch_tokens": 7}))
