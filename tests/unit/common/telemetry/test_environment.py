"""The recorded environment of a run: the code's commit, Python, platform and CPUs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from common.telemetry.environment import commit, environment


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_commit_is_the_codes_own(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("1\n")
    assert commit(code) is None
    git(code, "init", "-q")
    assert commit(code) is None  # nothing committed
    git(code, "add", "a.py")
    git(code, "commit", "-qm", "first")
    found = commit(code)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    (code / "a.py").write_text("2\n")
    assert commit(code) == {**found, "changed": True}
    (code / "site-packages").mkdir()
    assert commit(code / "site-packages") is None  # installed inside somebody's checkout


def test_the_environment_says_what_ran() -> None:
    found = environment()
    assert {"python", "platform", "cpus"} <= found.keys()
