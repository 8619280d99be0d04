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


def test_a_checkpoint_of_another_run_is_refused_at_once(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(top_k=64)
    inputs = read_inputs(config)
    identity = identity_of(
        config,
        tokenizer=inputs.tokenizer_fingerprint,
        teachers=TEACHERS,
        contexts=tuple(inputs.contexts),
        data=inputs.data_digest,
    )
    with Checkpoints(config.run.path / "checkpoints", keep=1).writing(Manifest(step=1, identity=identity, loop={})):
        pass
    (config.run.path / "metrics.jsonl").write_text("kept")
    monkeypatch.setattr(train, "cluster", lambda: pytest.fail("started Ray"))
    with pytest.raises(CheckpointError, match=r"loss\.top_k: the checkpoint has 64, this run has 32"):
        train.run(make(top_k=32), resume=True, quiet=True)
    assert (config.run.path / "metrics.jsonl").read_text() == "kept"
    with pytest.raises(pytest.fail.Exception, match="started Ray"):  # the same run goes on
        train.run(config, resume=True, quiet=True)
