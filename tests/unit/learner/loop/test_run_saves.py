"""The weights of a run on disk: when checkpoints are due, and every way out keeps what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from common.config.model import CheckpointConfig
from common.telemetry.run_files import Progress
from learner.cluster.services import Services
from learner.errors import RunError, SaveError, ServiceLost
from learner.evaluation.summary import RunSummary
from learner.loop.checkpoints import Identity, Manifest
from learner.loop.run_saves import CheckpointSchedule, RunSaves, checkpoint_interval_s
from tests.support.stub_loop import config_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_checkpoints_by_time_lose_minutes_and_take_two_percent() -> None:
    clock = Clock()
    schedule = CheckpointSchedule(CheckpointConfig(), 10_000, clock)
    written, spent, longest = 0, 0.0, 0.0
    last = 0.0
    for step in range(1, 5_000):  # of ten seconds, with checkpoints of one second
        clock.now += 10
        if schedule.is_due(step):
            longest = max(longest, clock.now - last)
            clock.now += 1
            written, spent, last = written + 1, spent + 1, clock.now
            schedule.wrote(1)
    assert written > 200
    assert spent < 0.02 * clock.now
    assert longest <= 190


def test_a_slow_disk_is_written_to_less_often() -> None:
    assert checkpoint_interval_s(0.5) == 180
    assert checkpoint_interval_s(60) == pytest.approx(49 * 60)  # 60 s of 3,000


def test_by_time_the_last_step_has_no_checkpoint_and_by_steps_it_has() -> None:
    clock = Clock()
    by_time, by_steps = (
        CheckpointSchedule(CheckpointConfig(), 5, clock),
        CheckpointSchedule(CheckpointConfig(every=2), 5),
    )
    clock.now = 1e6
    assert [step for step in range(1, 6) if by_time.is_due(step)] == [1, 2, 3, 4]
    assert [step for step in range(1, 6) if by_steps.is_due(step)] == [2, 4, 5]
    never = CheckpointSchedule(CheckpointConfig(every=0), 5, clock)
    assert not any(map(never.is_due, range(1, 6)))


# --- ways out -------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Disk:
    """Services of a learner that holds `version`. Folders named in `full` take no export; `state` False: no state."""

    def __init__(self, version: int, *, full: tuple[str, ...] = (), state: bool = True) -> None:
        self.version = version
        self.full = full
        self.state = state
        self.dropped: list[bool] = []
        self.saved: list[str] = []

    async def save(self, folder: str) -> None:
        if Path(folder).name in self.full and "runs" in folder:
            raise SaveError(f"{folder} was not written: No space left on device")
        write(Path(folder) / "model.safetensors", str(self.version))
        self.saved.append(folder)

    async def save_state(self, folder: str, *, drop_step: bool) -> None:
        self.dropped.append(drop_step)
        if not self.state:
            raise OSError(28, "No space left on device")
        write(Path(folder) / "state", str(self.version))

    async def weight_version(self) -> int:
        return self.version

    async def check_ranks(self) -> None:
        pass


IDENTITY = Identity(student="a", tokenizer="t", teachers={}, contexts=(), data="d", loss={}, rollout={}, learner={})


def saves_of(folder: Path, disk: Disk, *, steps: int, every: int | None = None) -> RunSaves:
    config = config_of()
    run = config.run.model_copy(update={"dir": folder / "runs"})
    config = config.model_copy(update={"run": run, "checkpoint": CheckpointConfig(every=every)})
    summary = RunSummary(planned_steps=10, steps=steps)
    return RunSaves(
        config,
        cast(Services, disk),
        Progress(),
        summary,
        lambda: Manifest(step=summary.steps, identity=IDENTITY, loop={}),
    )


def checkpoint_of(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "runs/r/checkpoints").glob("step-*/manifest.json")
    return dict(json.loads(path.read_text()))


async def test_a_failed_last_save_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    saves = saves_of(tmp_path, Disk(7, full=("checkpoint",)), steps=7)
    with pytest.raises(SaveError) as caught:
        await saves.at_end()
    text = str(caught.value)
    assert "checkpoint was not written: No space left on device" in text
    assert f"to go on from step 7: opcd train {tmp_path}/runs/r/config.yaml --resume" in text
    assert checkpoint_of(tmp_path)["step"] == 7


async def test_if_the_checkpoint_fails_too_the_weights_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    disk = Disk(7, full=("checkpoint",), state=False)
    with pytest.raises(SaveError, match=rf"the weights of step 7 are in {tmp_path}/opcd-r-.*/checkpoint: move them"):
        await saves_of(tmp_path, disk, steps=7).at_end()
    assert (Path(disk.saved[0]) / "model.safetensors").read_text() == "7"


async def test_a_failed_export_during_the_run_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saves = saves_of(tmp_path, Disk(3, full=("best", "step-000003")), steps=3)
    await saves.best(3, 0.5)
    assert "best was not written: No space left on device; the run goes on without it" in capsys.readouterr().out
    assert not (tmp_path / "runs/r/best").exists()


async def test_an_interrupt_writes_a_checkpoint_of_the_last_whole_step_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(4)
    await saves_of(tmp_path, disk, steps=4).interrupted()
    assert checkpoint_of(tmp_path)["step"] == 4
    assert disk.dropped == [True]
    assert (tmp_path / "runs/r/checkpoint/model.safetensors").read_text() == "4"
    printed = capsys.readouterr().out
    assert f"to go on from step 4: opcd train {tmp_path}/runs/r/config.yaml --resume\n" in printed


async def test_without_checkpoints_an_interrupt_writes_the_weights_alone(tmp_path: Path) -> None:
    await saves_of(tmp_path, Disk(4), steps=4, every=0).interrupted()
    assert not (tmp_path / "runs/r/checkpoints").exists()
    assert (tmp_path / "runs/r/checkpoint").exists()


async def test_a_failed_run_keeps_its_last_whole_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await saves_of(tmp_path, Disk(4), steps=4).failed(RunError("the teacher is gone"))
    assert checkpoint_of(tmp_path)["step"] == 4
    assert "to go on from step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "error"), [(5, RunError("the sync failed after the optimiser")), (4, ServiceLost("a rank died"))]
)
async def test_a_learner_that_holds_other_weights_writes_none(tmp_path: Path, version: int, error: RunError) -> None:
    await saves_of(tmp_path, Disk(version), steps=4).failed(error)
    assert not (tmp_path / "runs/r/checkpoints").exists()
