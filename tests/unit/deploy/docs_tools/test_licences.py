"""The page of licences agrees with the installed packages."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.docs_tools import licences


def test_the_page_is_current_and_lists_every_pinned_package() -> None:
    page = licences.page()
    assert licences.PAGE.read_text(encoding="utf-8") == page, "run: .venv/bin/python -m deploy.docs_tools.licences"
    pinned = [line for lock in licences.LOCKS for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert page.count("\n| ") == len(pinned) + 1
    for row in ("| torch | Apache-2.0", "| tiktoken | MIT License |", "| oss-harmony | Apache License 2.0 |"):
        assert row in page


def state(monkeypatch: pytest.MonkeyPatch, licence: str) -> None:
    """Let pip-licenses report one package."""
    reply = json.dumps([{"Name": "some-package", "License": licence, "Version": "1"}])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=reply))


def test_a_package_without_a_licence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    state(monkeypatch, "UNKNOWN")
    with pytest.raises(licences.UnstatedLicence, match="some-package"):
        licences.licences(["some-package"])
    monkeypatch.setattr(licences, "STATED_ELSEWHERE", {"some-package": "MIT"})
    assert licences.licences(["some-package"]) == [("some-package", "MIT")]


def test_check_fails_on_a_page_that_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state(monkeypatch, "MIT License\n\nPermission is hereby granted")
    monkeypatch.setattr(licences, "PAGE", tmp_path / "licences.md")
    assert licences.main(["--check"]) == 1
    assert "python -m deploy.docs_tools.licences" in capsys.readouterr().err
    assert licences.main([]) == 0
    assert licences.PAGE.read_text().endswith("| some-package | MIT License |\n")
    assert licences.main(["--check"]) == 0
