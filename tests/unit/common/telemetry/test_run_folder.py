"""A run's folder: locked while the run lives, and never replaced in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.config.model import ConfigError
from common.telemetry.run_folder import LOCK, check_free, check_start, clear, earlier_run, owned


def write_earlier_run(folder: Path, outcome: str | None, steps: int, *, checkpoint: bool = False) -> Path:
    with owned(folder):
        pass
    (folder / "config.yaml").write_text("run: {}\n")
    lines = [
        {"step": 0, "accuracy/base": 0.5},
        *({"step": step, "kl/lower_bound": 1.0} for step in range(1, steps + 1)),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99')
    if outcome is not None:
        (folder / "summary.json").write_text(json.dumps({"outcome": outcome}))
    if checkpoint:
        (folder / "checkpoints/step-000002").mkdir(parents=True)
        (folder / "checkpoints/step-000002/manifest.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("outcome", "steps", "checkpoint", "message"),
    [
        ("finished", 3, False, "holds a finished run of 3 steps"),
        ("finished", 3, True, "holds a finished run of 3 steps"),
        ("interrupted", 3, True, "a checkpoint, interrupted after 3 steps: --resume continues it"),
        (None, 3, True, "a checkpoint, unfinished after 3 steps: --resume continues it"),
        ("failed: RunError: NaN", 1, False, "without a checkpoint, failed: RunError: NaN after 1 steps"),
        (None, 1, False, "without a checkpoint, unfinished after 1 steps"),
    ],
)
def test_a_run_with_steps_is_not_replaced(
    tmp_path: Path, outcome: str | None, steps: int, checkpoint: bool, message: str
) -> None:
    folder = write_earlier_run(tmp_path / "demo", outcome, steps, checkpoint=checkpoint)
    with pytest.raises(ConfigError) as caught:
        check_free(folder, resume=False, overwrite=False)
    assert message in str(caught.value)
    assert "run.name=demo-2" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    check_free(folder, resume=True, overwrite=False)
    check_free(folder, resume=False, overwrite=True)


def test_a_run_that_ended_before_its_first_step_is_replaced_with_a_line(tmp_path: Path) -> None:
    folder = write_earlier_run(tmp_path / "demo", "failed: ConfigError: no GPU", 0)
    line = check_start(folder, resume=False, overwrite=False)
    assert line is not None
    assert "failed: ConfigError: no GPU" in line
    assert check_start(tmp_path / "new", resume=False, overwrite=False) is None


def test_files_that_no_run_wrote_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"did not write \(config.yaml\)"):
        check_free(tmp_path, resume=False, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_next_free_name_counts_on(tmp_path: Path) -> None:
    (tmp_path / "demo-3").mkdir()
    folder = write_earlier_run(tmp_path / "demo-2", "finished", 3)
    with pytest.raises(ConfigError, match=r"run\.name=demo-4"):
        check_free(folder, resume=False, overwrite=False)


def test_an_overwritten_run_leaves_nothing_and_other_files_stay(tmp_path: Path) -> None:
    folder = write_earlier_run(tmp_path / "demo", "finished", 3, checkpoint=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "offpolicy.jsonl").write_text("{}")
    clear(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "offpolicy.jsonl", LOCK]
    assert earlier_run(folder) is None


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        check_free(tmp_path, resume=True, overwrite=True)


HOLD = "import sys; from common.telemetry.run_folder import owned\nwith owned(__import__('pathlib').Path(sys.argv[1])):"


@pytest.mark.parametrize("flags", [{"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}])
def test_a_folder_in_use_is_refused_until_its_process_is_killed(tmp_path: Path, flags: dict[str, bool]) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-c", f"{HOLD}\n print('held', flush=True); sys.stdin.read()", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {process.pid} on .*run.name=demo-2"):
            check_free(folder, **flags)

        def take() -> None:
            with owned(folder):
                pass

        with pytest.raises(ConfigError, match="in use by another run"):
            take()
        process.kill()
    check_free(folder, **flags)
    take()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"file/demo cannot be written: Not a directory"),
        owned(tmp_path / "file/demo"),
    ):
        pass
