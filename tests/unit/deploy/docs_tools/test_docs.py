"""The configuration page agrees with the models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from common.config.model import Config
from deploy.docs_tools import docs


def test_the_page_is_current() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "run: .venv/bin/python -m deploy.docs_tools.docs"


def test_every_key_has_a_row() -> None:
    page = docs.page()
    for name, section in Config.model_fields.items():
        assert f"\n## {name}\n" in page
        if name == "teachers":  # by name, each with the keys of `teacher`
            continue
        assert isinstance(section.annotation, type)
        assert issubclass(section.annotation, BaseModel)
        for key in section.annotation.model_fields:
            assert page.count(f"\n| `{name}.{key}` |") == 1


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "integer"),
        (Annotated[int, Field(gt=0)], "integer > 0"),
        (Annotated[float, Field(ge=0, le=1)] | None, "number ≥ 0, ≤ 1 or `null`"),
        (Literal["a", "b"], "`a`, `b`"),
        (Literal["a", "b"] | None, "`a`, `b` or `null`"),
        (tuple[str, ...], "list of text"),
        (tuple[float, float], "list of 2: number"),
        (dict[str, int], "mapping"),
        (bool, "`true`, `false`"),
        (Path, "path"),
    ],
)
def test_types_are_described_in_words(annotation: object, words: str) -> None:
    assert docs.describe(annotation) == words


def test_fields_take_the_text_below_them_in_one_safe_line() -> None:
    assert docs.attribute_docstrings(Documented) == {"first": "Lines that go on, with a \\| and `code`.", "second": ""}


class Documented(BaseModel):
    """A section."""

    first: int = 1
    """Lines that
    go on, with a | and ``code``."""
    second: int = 2


def test_check_fails_on_a_page_that_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "PAGE", tmp_path / "configuration.md")
    assert docs.main(["--check"]) == 1
    assert "python -m deploy.docs_tools.docs" in capsys.readouterr().err
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    docs.PAGE.write_text(docs.PAGE.read_text() + "\n")
    assert docs.main(["--check"]) == 1
