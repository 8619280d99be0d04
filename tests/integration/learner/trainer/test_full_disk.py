"""A full disk on one rank: all ranks raise the error, and continue together."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from tests.support.learner_ranks import Ranks, smooth_config, totals, weights_now
from tests.support.scored import make_scored

FULL = Path("/dev/full")
"""A device that behaves like a full disk."""

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def fill_up(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(FULL)


def write_and_step(
    rank: int, config: Config, method: str, folders: list[str], scored: list[ScoredTrajectory]
) -> tuple[list[str | None], dict[str, Tensor]]:
    """Write into each folder with a step after each; return what each write raised, and the final weights."""
    import torch.distributed as dist

    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    errors: list[str | None] = []
    for folder in folders:
        try:
            getattr(engine, method)(Path(folder))
            errors.append(None)
        except OSError as error:
            errors.append(str(error))
        engine.accumulate(scored[rank :: dist.get_world_size()])
        assert engine.finish_step(*totals(scored)).applied
    return errors, weights_now(engine)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    ("stage", "file", "victim"),
    [
        (0, "mp_rank_00_model_states.pt", 0),
        (2, "zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
        (3, "zero_pp_rank_0_mp_rank_00_model_states.pt", 0),
        (2, "zero_to_fp32.py", 0),
        (0, "generators_1.pt", 1),
        (0, "shape.pt", 0),
    ],
)
def test_a_state_that_one_rank_cannot_write_is_an_error_on_all(
    two: Ranks, tiny_model: Path, tmp_path: Path, stage: int, file: str, victim: int
) -> None:
    config, scored = smooth_config(tiny_model, stage), make_scored(4)
    fill_up(tmp_path / "full/state" / file, tmp_path / "full" / file)
    folders = [str(tmp_path / "full"), str(tmp_path / "free")]
    results = two.call(write_and_step, config, "save_state", folders, scored)
    for errors, _ in results:
        assert errors[0] is not None
        assert errors[0].startswith(f"the learner's state: rank {victim}: ")
        assert f"rank {1 - victim}" not in errors[0]
        assert errors[1] is None
    undisturbed = two.call(write_and_step, config, "save_state", [str(tmp_path / "a"), str(tmp_path / "b")], scored)
    assert all(same(got, expected) for (_, got), (_, expected) in zip(results, undisturbed, strict=True))


def test_a_state_without_a_folder_is_an_error_on_all(two: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    for errors, _ in two.call(
        write_and_step, smooth_config(tiny_model, 2), "save_state", [str(tmp_path / "taken")], make_scored(2)
    ):
        assert errors[0] is not None
        assert "rank 0: " in errors[0]


def test_an_export_that_rank_0_cannot_write_is_an_error_on_all(two: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    folders = [str(tmp_path / "taken/export"), str(tmp_path / "export")]
    for errors, _ in two.call(write_and_step, smooth_config(tiny_model, 3), "save", folders, make_scored(4)):
        assert errors[0] is not None
        assert errors[0].startswith(f"{folders[0]} was not written: rank 0: ")
        assert f"[Errno {errno.ENOTDIR}]" in errors[0]
        assert errors[1] is None
    assert (tmp_path / "export/model.safetensors").exists()
