"""Other libraries' errors reach the user, ``summary.json`` and the report as one clean line."""

from __future__ import annotations

from pathlib import Path

import ray

from common.protocol.scoring import TeacherError
from learner.errors import RunError
from learner.loop.user_errors import known_error, outcome_of


def test_a_known_error_stays_what_it_is(tmp_path: Path) -> None:
    error = TeacherError("the teacher is down\nsecond line")
    assert known_error(error, tmp_path) is error
    assert outcome_of(error) == "failed: TeacherError: the teacher is down"
    assert not list(tmp_path.iterdir())


def test_another_librarys_error_is_one_line_and_its_traceback_a_file(tmp_path: Path) -> None:
    shown = known_error(ValueError("\x1b[36m(actor pid=1)\x1b[0m bad\n  value"), tmp_path)
    assert isinstance(shown, RunError)
    assert (
        str(shown) == f"ValueError: (actor pid=1) bad value (unexpected; the traceback is in {tmp_path / 'error.txt'})"
    )
    assert outcome_of(shown) == f"failed: RunError: {shown}"
    assert (tmp_path / "error.txt").read_text().startswith("ValueError: ")


def test_an_actors_error_is_its_last_line(tmp_path: Path) -> None:
    trace = "\x1b[36mray::Worker.ready()\x1b[39m (pid=7)\n  File x\nRuntimeError: no room for the engine"
    error = ray.exceptions.RayTaskError("ready", trace, RuntimeError("no room for the engine"))
    shown = str(known_error(error, tmp_path))
    assert shown.startswith("RuntimeError: no room for the engine (unexpected; ")
    assert "\x1b" not in shown
