"""A resume that cannot be is refused before Ray starts, and leaves the run's files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.config.model import Config
from learner import train
from learner.data.inputs import read_inputs
from learner.loop.checkpoints import CheckpointError, Checkpoints, Manifest, identity_of
from tests.support.configs import config_of

TEACHERS = {"default": "fingerprint"}


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Callable[..., Config]:
    (tmp_path / "train.jsonl").write_text('{"id": "a", "prompt": "Q: cat\\nA:"}')

    def config(**loss: int) -> Config:
        return config_of(
            run={"name": "r", "dir": str(tmp_path / "runs")},
            student={"model": str(tiny_model)},
            data={"train": str(tmp_path / "train.jsonl")},
            loss=loss,
        )

    return config


def write_checkpoint(config: Config, step: int) -> None:
    inputs = read_inputs(config)
    identity = identity_of(
        config,
        tokenizer=inputs.tokenizer_fingerprint,
        teachers=TEACHERS,
        contexts=tuple(inputs.contexts),
        data=inputs.data_digest,
    )
    with Checkpoints(config.run.path / "checkpoints", keep=1).writing(Manifest(step=step, identity=identity, loop={})):
        pass


def test_a_checkpoint_of_another_run_is_refused_at_once(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(top_k=64)
    write_checkpoint(config, step=1)
    (config.run.path / "metrics.jsonl").write_text("kept")
    monkeypatch.setattr(train, "cluster", lambda: pytest.fail("started Ray"))
    with pytest.raises(CheckpointError, match=r"loss\.top_k: the checkpoint has 64, this run has 32"):
        train.run(make(top_k=32), resume=True, quiet=True)
    assert (config.run.path / "metrics.jsonl").read_text() == "kept"
    with pytest.raises(pytest.fail.Exception, match="started Ray"):  # the same run goes on
        train.run(config, resume=True, quiet=True)


def test_a_dry_run_says_what_a_resume_would_do(make: Callable[..., Config]) -> None:
    config = make(top_k=64)
    inputs = read_inputs(config)
    with pytest.raises(CheckpointError, match=r"--resume: no checkpoint under"):
        train.check_resume(config, inputs, accept_changes=False)
    write_checkpoint(config, step=3)
    changed = make(top_k=32)
    with pytest.raises(CheckpointError, match=r"loss\.top_k: the checkpoint has 64, this run has 32"):
        train.check_resume(changed, read_inputs(changed), accept_changes=False)
    assert "step 3 of" in train.check_resume(changed, read_inputs(changed), accept_changes=True)
    assert "step 3 of" in train.check_resume(config, inputs, accept_changes=False)
